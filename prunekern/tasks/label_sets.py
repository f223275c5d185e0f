"""Labels of rows that may have several classes, or none: lists, texts with a separator, or a column for every class."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .labels import Rows, all_whole, class_name, class_names, unknown
from .task import DataError

_BITS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}  # as files write them, in small letters


def number_sets(rows: Mapping[str, Rows], label: str, separator: str | None) -> tuple[str, ...]:
    """Replace the labels of every file by 0 or 1 for each class; returns the class names (the training file's).

    A label is a list of classes, in CSV and TSV as Python and JSON write one ("['a', 'b']"); or, where there is a
    separator, a text with it between them, an empty field being none. Lists that are 0 or 1 for every class are taken
    as such: all of one length, and one of them says the same twice, or in true and false. Their classes are called "0",
    "1", ...
    """
    listed = {
        split: [_listed(v, w, label, separator, part.typed) for v, w in zip(part.labels, part.where, strict=True)]
        for split, part in rows.items()
    }
    train = rows["train"]
    if _are_bits(listed["train"]):
        width = len(listed["train"][0])
        for split, part in rows.items():
            part.labels = [_bits(v, w, label, width) for v, w in zip(listed[split], part.where, strict=True)]
        return tuple(map(str, range(width)))
    whole = all_whole((one for values in listed["train"] for one in values), train.typed)
    named = {
        split: [[class_name(one, w, label, whole) for one in v] for v, w in zip(listed[split], part.where, strict=True)]
        for split, part in rows.items()
    }
    names = class_names((one for values in named["train"] for one in values), train, label)
    numbers = {name: number for number, name in enumerate(names)}
    for split, part in rows.items():
        for place, (where, values) in enumerate(zip(part.where, named[split], strict=True)):
            bits = [0] * len(names)
            for one in values:
                if one not in numbers:
                    raise unknown(where, one, split, names)
                bits[numbers[one]] = 1
            part.labels[place] = bits
    return names


def number_columns(rows: Mapping[str, Rows], columns: Sequence[str]) -> tuple[str, ...]:
    """Replace the labels of every file, values of these columns, by 0 or 1 for each; returns the columns."""
    for part in rows.values():
        for where, values in zip(part.where, part.labels, strict=True):
            for place, (column, value) in enumerate(zip(columns, values, strict=True)):
                bit = _bit(value)
                if bit is None:
                    got = "null" if value is None else repr(value)
                    raise DataError(f"{where}: label {column!r} must be 0 or 1 (got {got})")
                values[place] = bit
    return tuple(columns)


def _listed(value: Any, where: str, label: str, separator: str | None, typed: bool) -> list[Any]:
    if separator is not None and (isinstance(value, str) or value is None and not typed):
        parts = [part.strip() for part in value.split(separator)] if value and value.strip() else []
        if "" in parts:
            between = f"between separators {separator!r}"
            raise DataError(f"{where}: label {label!r}: a class {between} is blank (got {value!r})")
        return parts
    found = value if typed else _written(value)
    if found is None and typed:
        raise DataError(f"{where}: label {label!r} is null; no class at all is []")
    if not isinstance(found, list):
        split = "; label_separator (--label-separator) splits a text into them" if separator is None else ""
        got = "null" if value is None else repr(value)
        raise DataError(f"{where}: label {label!r} must be a list of classes (got {got}){split}")
    return found


def _written(value: str | None) -> Any:
    """The list that a CSV's field is the text of, as Python and JSON write one; None for any other text.

    NumPy writes no commas, ['a' 'b'], which Python reads as one text 'ab': what is read must be written the same.
    """
    try:
        found = ast.literal_eval((value or "").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    again = (repr(found), json.dumps(found, ensure_ascii=False), json.dumps(found)) if isinstance(found, list) else ()
    return found if "".join((value or "").split()) in ("".join(text.split()) for text in again) else None


def _are_bits(lists: Sequence[Sequence[Any]]) -> bool:
    width = len(lists[0])
    if width < 2 or any(len(values) != width or None in map(_bit, values) for values in lists):
        return False
    if any(isinstance(one, str) for values in lists for one in values):
        return False
    return any(len(set(values)) < width or isinstance(values[0], bool) for values in lists)


def _bits(values: Sequence[Any], where: str, label: str, width: int) -> list[int]:
    bits = [_bit(value) for value in values]
    if len(values) != width or None in bits:
        raise DataError(
            f"{where}: label {label!r} must be a list of {width}, each 0 or 1, as in training (got {values!r})"
        )
    return [bit for bit in bits if bit is not None]


def _bit(value: Any) -> int | None:
    """0 or 1; None for what is neither."""
    if isinstance(value, str):
        return _BITS.get(value.strip().lower())
    try:
        return int(value) if value in (0, 1) else None
    except TypeError:
        return None
