"""What the labels of files are: classes, numbered, or the numbers of a regression."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from .task import DataError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LARGEST = 3.4028234e38  # of fp32, which labels of a regression are


@dataclass
class Rows:
    """One file: where each row stood, its texts [rows][columns], its labels, which become numbers.

    texts: strings; of `tokens` lists of words.

    typed: whether the file itself tells numbers from texts (JSON, parquet); in CSV and TSV all is text.
    """

    path: Path
    typed: bool
    where: list[str]
    texts: list[tuple[Any, ...]]
    labels: list[Any]


def is_regression(rows: Rows, label: str) -> bool:
    """Whether the labels are scores: all of them numbers, and not all whole. Whole ones are classes, 1.0 being 1.

    DataError where some are fractions and others no numbers at all: one of the two is not meant.
    """
    numbers = [_number(value, rows.typed) for value in rows.labels]
    fractions = [place for place, n in enumerate(numbers) if n is not None and not _is_whole(n)]
    if not fractions:
        return False
    if None in numbers:
        one, other = fractions[0], numbers.index(None)
        raise DataError(
            f"{rows.where[other]}: label {label!r} must be a class or a number throughout (got {rows.labels[other]!r}, "
            f"and {rows.labels[one]!r} at {rows.where[one]}); regression=False (--classes) takes both as classes"
        )
    return True


def number_classes(rows: Mapping[str, Rows], label: str) -> tuple[str, ...]:
    """Replace the labels of every file by class numbers; returns the class names (the training file's)."""
    train = rows["train"]
    whole = all_whole(train.labels, train.typed)
    for part in rows.values():
        part.labels = [class_name(v, w, label, whole) for v, w in zip(part.labels, part.where, strict=True)]
    names = class_names(train.labels, train, label)
    numbers = {name: number for number, name in enumerate(names)}
    for split, part in rows.items():
        for where, name in zip(part.where, part.labels, strict=True):
            if name not in numbers:
                raise unknown(where, name, split, names)
        part.labels = [numbers[name] for name in part.labels]
    return names


def class_names(found: Iterable[str], rows: Rows, label: str) -> tuple[str, ...]:
    """Names of classes in their order; DataError for fewer than two. rows: the training file's."""
    names = tuple(sorted(set(found), key=_order))
    if len(names) < 2:
        got = f"only {names[0]!r}" if names else "none"
        raise DataError(f"data file {rows.path}: label {label!r} needs 2 classes or more (got {got})")
    return names


def unknown(where: str, name: str, split: str, names: tuple[str, ...]) -> DataError:
    """What to say of a class that training does not have."""
    known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    return DataError(f"{where}: label {name!r} of the {split} file is unknown; training has {known}")


def all_whole(values: Iterable[Any], typed: bool) -> bool:
    """Whether classes are whole numbers: "1.0" is class 1 then, as in JSON. Where not all are, they are names ("3.8",
    "3.10") and stay as written.
    """
    found = [_number(value, typed) for value in values]
    return all(n is not None and _is_whole(n) for n in found)


def to_numbers(rows: Mapping[str, Rows], label: str) -> None:
    """Replace the labels of every file by floats."""
    for part in rows.values():
        part.labels = [_to_number(*pair, label) for pair in zip(part.labels, part.where, strict=True)]


def _number(value: Any, typed: bool) -> float | None:
    """The number that a label is; None for what is none. typed: a text is a text, whatever stands in it."""
    if isinstance(value, str):
        return None if typed or not _NUMBER.fullmatch(value.strip()) else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf


def _is_whole(number: float) -> bool:
    return math.isinf(number) or number.is_integer()


def class_name(value: Any, where: str, label: str, whole: bool) -> str:
    """A label as text: 1 in a parquet file, "1" in a CSV and 1.0 from a column with gaps are one class."""
    if isinstance(value, Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, str):
        name = value.strip()
        if not name:
            raise DataError(f"{where}: label {label!r} is blank")
        if whole and _NUMBER.fullmatch(name) and not name.lstrip("+-").isdigit():  # "01" stays as it is written
            number = float(name)
            return str(int(number)) if number.is_integer() else name
        return name
    if isinstance(value, float):
        if not value.is_integer():
            raise DataError(f"{where}: label {label!r} must be a class, not a fraction (got {value:g})")
        return str(int(value))
    if isinstance(value, int):  # booleans are "False" and "True"
        return str(value)
    kind = type(value).__name__
    raise DataError(f"{where}: label {label!r} must be a string or an integer (got {kind})")


def _order(name: str) -> tuple[int, float, str]:
    """Sort key of class names: numbers first, by value, then text."""
    number = float(name) if _NUMBER.fullmatch(name) else math.nan
    return (0, number, name) if math.isfinite(number) else (1, 0.0, name)


def _to_number(value: Any, where: str, label: str) -> float:
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python reads 1_000 as 1000
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: label {label!r} of a regression must be a number (got {value!r})") from None
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST:
        raise DataError(f"{where}: label {label!r} of a regression must be finite, in fp32 (got {number})")
    return number
