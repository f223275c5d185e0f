"""Items of lm-eval's tasks from local files, LOCAL/TASK/SPLIT.jsonl in the schema of the data set on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .task import DataError

_SPLITS = ("fewshot_split", "training_split", "validation_split", "test_split")


def source(local: Path, name: str, config: dict[str, Any], num_fewshot: int) -> dict[str, Any]:
    """The keys of a task's definition that say where its items are: for the files, read into memory here.

    config: the definition. Only splits that are evaluated, or that solved examples come from, are read.
    DataError for a folder or file that is not there, is not JSONL, or holds too few items.
    """
    from datasets import Dataset, DatasetDict

    folder = local / name
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in local.iterdir() if path.is_dir())) or "none"
        raise DataError(f"evaluate_tasks: local: {local} has no folder {name!r}; there are {there}")
    needed: set[Any] = {config.get("test_split") or config.get("validation_split")}
    if num_fewshot:
        needed.add(next(config[kind] for kind in _SPLITS if config.get(kind)))  # the order in which lm-eval looks
    splits = {}
    for split in sorted(needed):
        file = folder / f"{split}.jsonl"
        if not file.is_file():
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise DataError(f"{folder}: has no {file.name}, which {name} is evaluated with; there is {there}")
        records = _records(file)
        if len(records) <= num_fewshot:
            raise DataError(f"{file}: must hold at least {num_fewshot + 1} items (got {len(records)})")
        splits[split] = Dataset.from_list(records)
    # load_dataset reports every load of a local file to a server, and keeps a copy of the file: this does neither.
    data = {"custom_dataset": lambda **_: DatasetDict(splits), "dataset_kwargs": None}
    return data | {kind: config.get(kind) if config.get(kind) in needed else None for kind in _SPLITS}


def _records(file: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} line {number}: not JSON ({error})") from error
        if not isinstance(records[-1], dict):
            raise DataError(f"{file} line {number}: expected a JSON object, got {type(records[-1]).__name__}")
    return records


def check(task: Any, folder: Path, limit: int | None) -> None:
    """DataError for an item whose answer is none of its choices: lm-eval would count it as wrong."""
    for number, item in enumerate(task.eval_docs, start=1):
        if limit is not None and number > limit:
            break
        try:
            choices = task.doc_to_choice(item)
            answer = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
        except Exception as error:  # a template of the definition met the item: it may raise anything
            raise DataError(f"{folder}: item {number}: {type(error).__name__}: {error}") from error
        for one in answer if isinstance(answer, list) else [answer]:
            if not (one in choices or isinstance(one, int) and 0 <= one < len(choices)):
                raise DataError(f"{folder}: item {number}: answer must be one of {len(choices)} choices (got {one!r})")
