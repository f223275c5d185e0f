"""Any local CSV, TSV, JSONL or parquet file with named columns, as a task."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources.readers import READERS, read
from .split import draw, text_key
from .task import SPLITS, DataError, Task, label_dataset

EXTENSIONS = tuple(READERS)


@dataclass
class _Rows:
    """One file: where each row stood, its texts [rows][columns], its raw labels."""

    path: Path
    where: list[str]
    texts: list[tuple[str, ...]]
    labels: list[Any]


def load(
    path: str | os.PathLike[str],
    text: str | Sequence[str] = "text",
    label: str = "label",
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    regression: bool = False,
    metric: str | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> Task:
    """A task out of one to three files, read into memory.

    path: training rows; its extension (EXTENSIONS) says the format.
    text: the column of the text, or two of them for pairs.
    label: its column. For a classification strings, integers or booleans: classes are those of `path`, in the
        order of their values (numerical where they are integers). For a regression numbers.
    validation, test: files of their own, of any of the formats. What is not given is drawn from `path`, as
        the given share of its rows, the same way everywhere and with no duplicate in two splits
        (`split.grouped_split`). test_share=0: no test split.
    metric: "accuracy" (default) or "matthews"; for a regression "pearson".
    Raises FileNotFoundError; ValueError for an argument out of range; DataError, naming file and line, for a
    null or blank text, a null label, a label in validation or test that `path` does not have, a label that is
    not a number in a regression, and whatever `readers.read` refuses (a missing column, an empty file, ...).
    """
    from datasets import DatasetDict

    text_columns = (text,) if isinstance(text, str) else tuple(text)
    metric = _check_arguments(text_columns, label, regression, metric, validation_share, test_share)
    files = {"train": Path(path)}
    if validation is not None:
        files["validation"] = Path(validation)
    if test is not None:
        files["test"] = Path(test)
    rows = {name: _read(file, text_columns, label) for name, file in files.items()}
    # Labels before splits: a class whose only rows are drawn into another split is still a known class.
    names = None if regression else _number_classes(rows, label)
    if regression:
        for part in rows.values():
            part.labels = _numbers(part, label)
    rows |= _draw(rows, {"test": test_share, "validation": validation_share})
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
    regression: bool,
    metric: str | None,
    validation_share: float,
    test_share: float,
) -> str:
    """The metric's name; raises ValueError for an argument out of range."""
    from .metrics import CLASSIFICATION, REGRESSION

    if len(text) not in (1, 2) or len({*text, label}) != len(text) + 1:
        raise ValueError(f"text must be one or two columns, not the label's (got {text!r}, {label!r})")
    accepted = REGRESSION if regression else CLASSIFICATION
    if metric is not None and metric not in accepted:
        kind = "regression" if regression else "classification"
        raise ValueError(f"metric of a {kind} must be one of {', '.join(accepted)} (got {metric!r})")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be between 0 and 1 (got {validation_share})")
    if not 0 <= test_share < 1 - validation_share:
        raise ValueError(f"test_share must be in [0, 1 - validation_share) (got {test_share})")
    return metric or accepted[0]


def _read(path: Path, text_columns: tuple[str, ...], label: str) -> _Rows:
    rows = _Rows(path, [], [], [])
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


def _draw(rows: dict[str, _Rows], shares: dict[str, float]) -> dict[str, _Rows]:
    """Splits drawn from rows["train"], for those that have no file of their own, and what is left of it."""
    train = rows["train"]
    wanted = {name: share for name, share in shares.items() if name not in rows and share > 0}
    parts = draw(train.path, [text_key(*texts) for texts in train.texts], wanted)
    return {
        name: _Rows(
            train.path,
            [train.where[index] for index in indices],
            [train.texts[index] for index in indices],
            [train.labels[index] for index in indices],
        )
        for name, indices in parts.items()
    }


def _class_name(value: Any, where: str, label: str) -> str:
    """A label as text: 1 in a parquet file, "1" in a CSV and 1.0 from a column with gaps are one class."""
    if isinstance(value, str):
        name = value.strip()
        if not name:
            raise DataError(f"{where}: label {label!r} is blank")
        return name
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{where}: label {label!r} must be a class, not a fraction (got {value:g})")
        return str(int(value))
    if isinstance(value, int):  # booleans are "False" and "True"
        return str(value)
    kind = type(value).__name__
    raise DataError(f"{where}: label {label!r} must be a string or an integer (got {kind})")


def _order(name: str) -> tuple[int, int, str]:
    """Sort key of class names: integers first, by value, then text."""
    try:
        return (0, int(name), name)
    except ValueError:
        return (1, 0, name)


def _number_classes(rows: dict[str, _Rows], label: str) -> tuple[str, ...]:
    """Replace the labels of every file by class numbers; returns the class names (the training file's)."""
    for part in rows.values():
        part.labels = [_class_name(*pair, label) for pair in zip(part.labels, part.where, strict=True)]
    train = rows["train"]
    names = tuple(sorted(set(train.labels), key=_order))
    if len(names) < 2:
        raise DataError(f"data file {train.path}: label {label!r} needs 2 classes or more (got only {names[0]!r})")
    numbers = {name: number for number, name in enumerate(names)}
    for split, part in rows.items():
        for where, name in zip(part.where, part.labels, strict=True):
            if name not in numbers:
                known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
                raise DataError(f"{where}: label {name!r} of the {split} file is unknown; training has {known}")
        part.labels = [numbers[name] for name in part.labels]
    return names


def _numbers(rows: _Rows, label: str) -> list[float]:
    out = []
    for value, where in zip(rows.labels, rows.where, strict=True):
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{where}: label {label!r} of a regression must be a number (got {value!r})") from None
        if not math.isfinite(number):
            raise DataError(f"{where}: label {label!r} of a regression must be finite (got {number})")
        out.append(number)
    return out
