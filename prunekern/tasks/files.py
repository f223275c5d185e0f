"""Any local CSV, TSV, JSON or parquet file with named columns, or a file of one word a line, as a task."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import tagged
from .asked import LISTS, Asked, asked_of
from .entities import IGNORED, OUTSIDE, marks_spans
from .label_sets import number_columns, number_sets
from .labels import Rows, is_regression, number_classes, to_numbers
from .multi_label import MultiLabelTask
from .sources import conll
from .sources.readers import READERS, read
from .split import draw, text_key
from .task import SPLITS, DataError, Task, label_dataset
from .tokens import TokenTask

EXTENSIONS = (*READERS, *conll.ALWAYS)
_TEXT_ONLY = (".csv", ".tsv")  # numbers are texts in them


def load(
    path: str | os.PathLike[str],
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    regression: bool | None = None,
    metric: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    task_type: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_separator: str | None = None,
) -> Task:
    """A task out of one to three files, read into memory.

    path: training rows; its extension (EXTENSIONS) says the format.
    text: the column of the text ("text" without it), or two of them for pairs; of tokens, lists of words ("tokens").
    label: its column ("label" without it; of tokens "tags").
    task_type: one of TASK_TYPES. None lets the labels of `path` decide: lists are classes of a "multi-label" task, or,
        where the text is a list too, the tags of "tokens"; numbers that are not all whole (0.0, 2.5) are the scores of
        a "regression"; all else are classes of a "classification".
        "classification": strings, integers or booleans; classes are those of `path`, in the order of their values
        (numerical where they are numbers). Whole numbers count the same however they are written: 1, 1.0, and "1" and
        "1.0" of a CSV, are one class. Only in CSV and TSV, where all is text, are texts looked at for numbers.
        "regression": numbers.
        "multi-label": lists of classes, see `label_sets.number_sets`. label_separator: what stands between classes
        where a label is a text ("a|b"). label_columns: a column of 0 or 1 for every class, instead of `label`.
        "tokens": a tag for every word, -100 for words that are not asked about. Also in files of one word a line and a
        blank line between sentences (`conll.read_conll`): .conll, .iob and .bio, and, where the task type is given,
        .txt and .tsv; they have no named columns.
    regression: True and False are task_type "regression" and "classification".
    validation, test: files of their own, of any of the formats. What is not given is drawn from `path`, as
        the given share of its rows, the same way everywhere and with no duplicate in two splits
        (`split.grouped_split`). test_share=0: no test split.
    metric: one of `metrics.METRICS` of the task type; without it the first; of tags that do not mark spans "accuracy".
        Where task_type is None it decides between classes and scores, too.
    Raises FileNotFoundError; ValueError for an argument out of range, or two that contradict each other; DataError,
    naming file and line, for a null or blank text or word, a null label, labels that are not what the task type asks
    for, a class in validation or test that `path` does not have, scored labels that leave the metric undefined, and
    whatever the readers refuse (a missing column, an empty file, ...).
    """
    files = {"train": Path(path)}
    if validation is not None:
        files["validation"] = Path(validation)
    if test is not None:
        files["test"] = Path(test)
    asked = asked_of(files["train"], text, label, task_type, regression, metric, label_columns, label_separator)
    _check_shares(validation_share, test_share)
    rows = {"train": _read(files["train"], asked)}
    asked = asked.for_rows(rows["train"])
    rows |= {name: _read(file, asked) for name, file in files.items() if name != "train"}
    for part in rows.values():
        _check(part, asked)
    if asked.task_type is None:
        # A metric that did not decide is one of classes.
        scores = metric is None and is_regression(rows["train"], asked.label)
        asked = asked.as_type("regression" if scores else "classification")
    # Labels before splits: a class whose only rows are drawn into another split is still a known class.
    names = _number(rows, asked)
    rows |= _draw(rows, {"test": test_share, "validation": validation_share})
    task = _task(Path(path).name, rows, asked, names)
    _check_scored(rows[task.score_split], task)
    return task


def _check_shares(validation_share: float, test_share: float) -> None:
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1 (got {validation_share})")
    if not 0 <= test_share < 1 - validation_share:
        raise ValueError(f"test_share must be in [0, 1 - validation_share) (got {test_share})")


def _read(path: Path, asked: Asked) -> Rows:
    """Texts and labels as the file holds them; of several label columns a label is the list of their values."""
    typed = path.suffix.lower() not in _TEXT_ONLY
    rows = Rows(path, typed, [], [], [])
    if asked.task_type == "tokens" and path.suffix.lower() not in LISTS:
        if path.suffix.lower() not in conll.EXTENSIONS:
            accepted = ", ".join((*LISTS, *conll.EXTENSIONS))
            raise ValueError(
                f"data file {path}: extension must, for tokens, be one of {accepted} (got {path.suffix!r})"
            )
        for where, (words, tags) in conll.read_conll(path):
            rows.where.append(where)
            rows.texts.append((words,))
            rows.labels.append(tags)
        return rows
    texts, several = len(asked.text), len(asked.label_columns) > 1
    for where, values in read(path, (*asked.text, *asked.label_columns)):
        rows.where.append(where)
        rows.texts.append(tuple(values[:texts]))
        rows.labels.append(values[texts:] if several else values[texts])
    return rows


def _check(rows: Rows, asked: Asked) -> None:
    """DataError for a text, or a label, that no task of the type can use; what classes are said is checked later."""
    for where, texts, label in zip(rows.where, rows.texts, rows.labels, strict=True):
        if asked.task_type == "tokens":
            tagged.check_words(where, asked.text[0], texts[0], label)
            continue
        for column, text in zip(asked.text, texts, strict=True):
            check_text(where, column, text)
        if asked.task_type != "multi-label" and (label is None or (isinstance(label, float) and math.isnan(label))):
            raise DataError(f"{where}: label {asked.label!r} is null")


def check_text(where: str, column: str, value: Any) -> None:
    """Raises DataError unless it is a string with something in it that every tokenizer takes."""
    if value is None:
        raise DataError(f"{where}: text {column!r} is null")
    if not isinstance(value, str):
        raise DataError(f"{where}: text {column!r} must be a string (got {type(value).__name__})")
    if not value.strip():
        raise DataError(f"{where}: text {column!r} is blank")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write half of an emoji; no tokenizer takes it
            raise DataError(f"{where}: text {column!r} holds half a character (a lone surrogate)") from error


def _number(rows: Mapping[str, Rows], asked: Asked) -> tuple[str, ...] | None:
    """Replace the labels of every file by numbers; returns the names of classes, None where there are none."""
    if asked.task_type == "regression":
        to_numbers(rows, asked.label)
        return None
    if asked.task_type == "tokens":
        return tagged.number_tags(rows, asked.label, asked.metric)
    if asked.task_type == "classification":
        return number_classes(rows, asked.label)
    if len(asked.label_columns) > 1:
        return number_columns(rows, asked.label_columns)
    return number_sets(rows, asked.label, asked.label_separator)


def _draw(rows: dict[str, Rows], shares: dict[str, float]) -> dict[str, Rows]:
    """Splits drawn from rows["train"], for those that have no file of their own, and what is left of it."""
    train = rows["train"]
    wanted = {name: share for name, share in shares.items() if name not in rows and share > 0}
    keys = [text_key(*(" ".join(text) if isinstance(text, list) else text for text in texts)) for texts in train.texts]
    return {
        name: Rows(
            train.path,
            train.typed,
            [train.where[index] for index in indices],
            [train.texts[index] for index in indices],
            [train.labels[index] for index in indices],
        )
        for name, indices in draw(train.path, keys, wanted).items()
    }


def _task(name: str, rows: Mapping[str, Rows], asked: Asked, names: tuple[str, ...] | None) -> Task:
    from datasets import DatasetDict

    from .metrics import METRICS

    assert asked.task_type is not None
    spans = asked.task_type == "tokens" and names is not None and marks_spans(names)
    default = "accuracy" if asked.task_type == "tokens" and not spans else METRICS[asked.task_type][0]
    kind = {"multi-label": MultiLabelTask, "tokens": TokenTask}.get(asked.task_type, Task)
    task = kind(name, DatasetDict({}), asked.text, asked.label, names, asked.metric or default)
    splits = {}
    for split in (split for split in SPLITS if split in rows):
        texts = map(list, zip(*rows[split].texts, strict=True))
        columns: dict[str, list[Any]] = dict(zip(asked.text, texts, strict=True))
        columns[asked.label] = rows[split].labels
        splits[split] = label_dataset(columns, asked.text, asked.label, task.text_feature(), task.label_feature())
    return replace(task, splits=DatasetDict(splits))


def _check_scored(rows: Rows, task: Task) -> None:
    """DataError where the scored rows leave a metric undefined: better before training than after."""
    from .metrics import CORRELATIONS

    if task.metric in CORRELATIONS and len(set(rows.labels)) < 2:
        raise DataError(
            f"data file {rows.path}: label {task.label_column!r} is the same in every scored row ({len(rows.labels)}), "
            f"where {task.metric} is undefined; metric 'mse' is not"
        )
    if task.metric in ("micro_f1", "macro_f1") and not any(map(any, rows.labels)):
        raise DataError(
            f"data file {rows.path}: no scored row ({len(rows.labels)}) has a class, where {task.metric} is undefined; "
            "metric 'exact_match' is not"
        )
    if task.metric == "entity_f1":
        names = task.label_names or ()
        if all(tag == IGNORED or names[tag] == OUTSIDE for tags in rows.labels for tag in tags):
            raise DataError(
                f"data file {rows.path}: no scored row ({len(rows.labels)}) has an entity, where entity_f1 is "
                "undefined; metric 'accuracy' is not"
            )
