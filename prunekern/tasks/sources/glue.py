"""The eight GLUE tasks of the paper, through `datasets.load_dataset`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..task import DataError, Task

SOURCE = "nyu-mll/glue"


@dataclass(frozen=True)
class Glue:
    """Columns, label names (None: regression), metric and validation split of a task, as on the hub."""

    text: tuple[str, ...]
    labels: tuple[str, ...] | None
    metric: str = "accuracy"
    validation: str = "validation"


TASKS = {
    "mrpc": Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "rte": Glue(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": Glue(("sentence",), ("negative", "positive")),
    "mnli": Glue(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), validation="validation_matched"
    ),
    "cola": Glue(("sentence",), ("unacceptable", "acceptable"), metric="matthews"),
    "qnli": Glue(("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": Glue(("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": Glue(("sentence1", "sentence2"), None, metric="pearson"),
}


def load(name: str, source: str | os.PathLike[str] = SOURCE) -> Task:
    """One GLUE task: "train" and "validation". The test splits have hidden labels, so they are never loaded.

    name: a key of TASKS. source: dataset name on the hub, or a local folder of the same layout (README.md
    with the configurations, one folder of parquet files per task), for machines the hub is out of reach of.
    Raises ValueError for an unknown name, FileNotFoundError for a folder that is not there, DataError when
    the hub cannot be reached or what came is not that task.
    """
    import datasets

    if name not in TASKS:
        raise ValueError(f"GLUE task must be one of {', '.join(TASKS)} (got {name!r})")
    glue, source = TASKS[name], os.fspath(source)
    if source != SOURCE and (os.path.isabs(source) or source.startswith(".")) and not os.path.isdir(source):
        raise FileNotFoundError(f"source of GLUE task {name!r}: there is no folder {source}")
    try:
        train, validation = datasets.load_dataset(source, name, split=["train", glue.validation])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"GLUE task {name!r} could not be loaded from {source!r} ({type(error).__name__}: {reason}); "
            f"without the hub, pass source=FOLDER, a local copy of the dataset repository {SOURCE}"
        ) from error
    splits = datasets.DatasetDict({"train": train, "validation": validation})
    for split, data in splits.items():
        _check(name, glue, split, data)
    return Task(f"GLUE {name}", splits, glue.text, "label", glue.labels, glue.metric)


def _check(name: str, glue: Glue, split: str, data: Any) -> None:
    """Raise DataError unless `data` has the task's columns and only public labels."""
    import numpy as np

    where = f"GLUE task {name!r}, split {split!r}"
    for column in (*glue.text, "label"):
        if column not in data.column_names:
            present = ", ".join(data.column_names)
            raise DataError(f"{where}: column {column!r} is missing; there are {present}")
    if len(data) == 0:
        raise DataError(f"{where}: no rows")
    found = getattr(data.features["label"], "names", None)
    if found is not None and tuple(found) != glue.labels:
        expected = ", ".join(glue.labels or ("numbers",))
        raise DataError(f"{where}: labels are {', '.join(found)}; expected {expected}")
    labels = np.asarray(data.with_format("numpy")["label"][:], dtype=np.float64)
    if glue.labels is None:
        wrong = ~((labels >= 0) & (labels <= 5))  # STS-B's scale; also catches -1 and NaN
    else:
        wrong = ~np.isin(labels, np.arange(len(glue.labels)))
    if wrong.any():
        row = int(wrong.argmax())
        accepted = "0..5" if glue.labels is None else f"0..{len(glue.labels) - 1}"
        raise DataError(
            f"{where}, row {row + 1}: label must be in {accepted} (got {labels[row]:g}; -1 is a hidden label)"
        )
