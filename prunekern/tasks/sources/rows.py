"""A row of named columns, with its place for error messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..task import DataError


class Row(NamedTuple):
    """where: "FILE line 7" (parquet: "FILE row 7"), from 1. values: one per column asked for, or None."""

    where: str
    values: list[Any]


def require(path: Path, columns: Iterable[str], present: Sequence[str]) -> None:
    """DataError unless each of the columns is there once."""
    for column in columns:
        if column not in present:
            # A blank at an end, or a character that does not show (UTF-16 without its mark), is what made it another.
            listed = ", ".join(n if n == n.strip() and n.isprintable() else repr(n) for n in present) or "none"
            raise DataError(f"data file {path}: column {column!r} is missing; there are {listed}")
        if present.count(column) > 1:
            raise DataError(f"data file {path}: column {column!r} is there {present.count(column)} times")


def not_utf8(path: Path, line: int, raw: bytes, error: UnicodeDecodeError) -> DataError:
    """What to say of bytes that are no UTF-8. raw: the file's first ones."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return DataError(f"{path} line 1: not UTF-8 but UTF-16; save it as UTF-8")
    if raw.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return DataError(f"{path} line 1: not UTF-8 but an archive; unpack it")
    return DataError(f"{path} line {line}: not UTF-8 ({error.reason})")
