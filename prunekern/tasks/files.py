"""Any local CSV, TSV, JSONL or parquet file with named columns, as a task."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .labels import Rows, is_regression, number_classes, to_numbers
from .sources.readers import READERS, read
from .split import draw, text_key
from .task import SPLITS, DataError, Task, label_dataset

EXTENSIONS = tuple(READERS)
_TEXT_ONLY = (".csv", ".tsv")  # numbers are texts in them


def load(
    path: str | os.PathLike[str],
    text: str | Sequence[str] = "text",
    label: str = "label",
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    regression: bool | None = None,
    metric: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> Task:
    """A task out of one to three files, read into memory.

    path: training rows; its extension (EXTENSIONS) says the format.
    text: the column of the text, or two of them for pairs.
    label: its column. For a classification strings, integers or booleans: classes are those of `path`, in the
        order of their values (numerical where they are numbers). For a regression numbers.
    regression: True or False; None decides by the labels of `path`: numbers that are not all whole (0.0, 2.5) are the
        scores of a regression, all else are classes. Whole ones count the same however they are written: 1, 1.0, and
        "1" and "1.0" of a CSV, are one class. Only in CSV and TSV, where all is text, are texts looked at for numbers.
    validation, test: files of their own, of any of the formats. What is not given is drawn from `path`, as
        the given share of its rows, the same way everywhere and with no duplicate in two splits
        (`split.grouped_split`). test_share=0: no test split.
    metric: "accuracy" (default) or "matthews"; for a regression "pearson" (default), "spearman" or "mse". Where
        `regression` is None it decides that, too.
    Raises FileNotFoundError; ValueError for an argument out of range; DataError, naming file and line, for a
    null or blank text, a null label, fractions and texts in one label column, a label in validation or test that
    `path` does not have, a label that is not a number in a regression, scored labels that are all the same where the
    metric is a correlation, and whatever `readers.read` refuses (a missing column, an empty file, ...).
    """
    from datasets import DatasetDict

    from .metrics import CLASSIFICATION, CORRELATIONS, REGRESSION

    text_columns = (text,) if isinstance(text, str) else tuple(text)
    regression = _check_arguments(text_columns, label, regression, metric, validation_share, test_share)
    files = {"train": Path(path)}
    if validation is not None:
        files["validation"] = Path(validation)
    if test is not None:
        files["test"] = Path(test)
    rows = {name: _read(file, text_columns, label) for name, file in files.items()}
    if regression is None:
        regression = is_regression(rows["train"], label)
    # Labels before splits: a class whose only rows are drawn into another split is still a known class.
    names = None if regression else number_classes(rows, label)
    if regression:
        to_numbers(rows, label)
    metric = metric or (REGRESSION if regression else CLASSIFICATION)[0]
    rows |= _draw(rows, {"test": test_share, "validation": validation_share})
    if metric in CORRELATIONS:
        _check_spread(rows["test" if "test" in rows else "validation"], label, metric)
    splits = {}
    for name in SPLITS:
        if name in rows:
            texts = map(list, zip(*rows[name].texts, strict=True))
            columns: dict[str, list[Any]] = dict(zip(text_columns, texts, strict=True))
            columns[label] = rows[name].labels
            splits[name] = label_dataset(columns, text_columns, label, regression)
    return Task(Path(path).name, DatasetDict(splits), text_columns, label, names, metric)


def _check_arguments(
    text: tuple[str, ...],
    label: str,
    regression: bool | None,
    metric: str | None,
    validation_share: float,
    test_share: float,
) -> bool | None:
    """`regression`, or what the metric says of it; raises ValueError for an argument out of range."""
    from .metrics import CLASSIFICATION, REGRESSION

    if len(text) not in (1, 2) or len({*text, label}) != len(text) + 1:
        raise ValueError(f"text must be one or two columns, not the label's (got {text!r}, {label!r})")
    if regression is None and metric in REGRESSION + CLASSIFICATION:
        regression = metric in REGRESSION
    accepted = REGRESSION if regression else CLASSIFICATION
    if metric is not None and metric not in accepted:
        kind = "regression" if regression else "classification"
        other = f", of a regression one of {', '.join(REGRESSION)}" if regression is None else ""
        raise ValueError(f"metric of a {kind} must be one of {', '.join(accepted)} (got {metric!r}){other}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1 (got {validation_share})")
    if not 0 <= test_share < 1 - validation_share:
        raise ValueError(f"test_share must be in [0, 1 - validation_share) (got {test_share})")
    return regression


def _check_spread(rows: Rows, label: str, metric: str) -> None:
    """DataError where the scored rows leave a correlation undefined: better before training than after."""
    if len(set(rows.labels)) < 2:
        raise DataError(
            f"data file {rows.path}: label {label!r} is the same in every scored row ({len(rows.labels)}), where "
            f"{metric} is undefined; metric 'mse' is not"
        )


def _read(path: Path, text_columns: tuple[str, ...], label: str) -> Rows:
    rows = Rows(path, path.suffix.lower() not in _TEXT_ONLY, [], [], [])
    for where, values in read(path, (*text_columns, label)):
        for column, value in zip(text_columns, values, strict=False):
            check_text(where, column, value)
        if values[-1] is None or (isinstance(values[-1], float) and math.isnan(values[-1])):
            raise DataError(f"{where}: label {label!r} is null")
        rows.where.append(where)
        rows.texts.append(tuple(values[:-1]))
        rows.labels.append(values[-1])
    return rows


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


def _draw(rows: dict[str, Rows], shares: dict[str, float]) -> dict[str, Rows]:
    """Splits drawn from rows["train"], for those that have no file of their own, and what is left of it."""
    train = rows["train"]
    wanted = {name: share for name, share in shares.items() if name not in rows and share > 0}
    parts = draw(train.path, [text_key(*texts) for texts in train.texts], wanted)
    return {
        name: Rows(
            train.path,
            train.typed,
            [train.where[index] for index in indices],
            [train.texts[index] for index in indices],
            [train.labels[index] for index in indices],
        )
        for name, indices in parts.items()
    }
