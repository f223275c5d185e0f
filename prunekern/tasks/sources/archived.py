"""A task from texts and labels of one archive, which come without a split: ours is drawn by the texts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..split import grouped_split, text_key
from ..task import Task, label_dataset


def archived_task(
    name: str,
    sentences: Sequence[str],
    labels: Sequence[int],
    label_names: tuple[str, ...],
    sizes: Mapping[str, int],
    **columns: Sequence[Any],
) -> Task:
    """The task of these rows; metric accuracy. columns: further ones, after sentence and label.

    sizes: rows of "test" and "validation", drawn by `split.grouped_split`, so that the split is the same everywhere
    and no duplicate is in two of its parts; the rest is for training.
    """
    from datasets import DatasetDict, Value

    parts = grouped_split([text_key(sentence) for sentence in sentences], sizes)
    rows = {"sentence": sentences, "label": labels, **columns}
    splits = {
        part: label_dataset(
            {column: [values[index] for index in parts[part]] for column, values in rows.items()},
            ("sentence",),
            "label",
            Value("string"),
            Value("int64"),
        )
        for part in ("train", *reversed(list(sizes)))
    }
    return Task(name, DatasetDict(splits), ("sentence",), "label", label_names, "accuracy")
