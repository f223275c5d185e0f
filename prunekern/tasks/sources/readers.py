"""Rows of named columns out of CSV, JSONL and parquet files, each with its place for error messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..task import DataError


class Row(NamedTuple):
    """where: "FILE line 7" (parquet: "FILE row 7"), from 1. values: one per column asked for, or None."""

    where: str
    values: list[Any]


def read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file, in its order. Values as the file holds them; in CSV strings, an empty field being null.

    Raises FileNotFoundError for a file that is not there; ValueError for an extension not in READERS;
    DataError for an empty file, a missing column (naming those there are), a malformed line, a file that is
    not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        accepted = ", ".join(READERS)
        raise ValueError(f"data file {path}: extension must be one of {accepted} (got {path.suffix!r})")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"data file {path} {what}")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    count = 0
    for row in reader(path, columns):
        count += 1
        yield row
    if count == 0:
        raise DataError(f"data file {path} has no rows")


def _require(path: Path, columns: Iterable[str], present: Sequence[str]) -> None:
    for column in columns:
        if column not in present:
            listed = ", ".join(present) or "none"
            raise DataError(f"data file {path}: column {column!r} is missing; there are {listed}")
        if present.count(column) > 1:
            raise DataError(f"data file {path}: column {column!r} is there {present.count(column)} times")


def _separated(delimiter: str) -> Any:
    def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(2**31 - 1)  # a text may be longer than csv's 131,072 characters
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            line = 0
            try:
                header = next(reader, [])
                _require(path, columns, header)
                chosen = [header.index(column) for column in columns]
                line = reader.line_num  # a quoted field may span lines: a record starts after the last one
                for record in reader:
                    where, line = f"{path} line {line + 1}", reader.line_num
                    if not record:  # a blank line
                        continue
                    if len(record) != len(header):
                        raise DataError(f"{where}: {len(record)} fields, but the header names {len(header)}")
                    yield Row(where, [record[index] or None for index in chosen])
            except csv.Error as error:
                raise DataError(f"{path} line {line + 1}: not valid CSV ({error})") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {_undecodable(path)}: not UTF-8 ({error.reason})") from error

    return read_rows


def _undecodable(path: Path) -> int:
    """The first line that is not UTF-8: text is decoded in blocks, whose errors do not tell."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with open(path, "rb") as file:
        first = True
        for line, raw in enumerate(file, start=1):
            where = f"{path} line {line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason})") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
            if first:
                _require(path, columns, list(record))
                first = False
            for column in columns:
                if column not in record:
                    listed = ", ".join(record) or "none"
                    raise DataError(f"{where}: column {column!r} is missing; there are {listed}")
            yield Row(where, [record[column] for column in columns])


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require(path, columns, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=list(columns)):
                lists = [batch.column(column).to_pylist() for column in columns]
                for values in zip(*lists, strict=True):
                    row += 1
                    yield Row(f"{path} row {row}", list(values))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"data file {path} cannot be read as parquet: {reason}") from error


READERS = {".csv": _separated(","), ".tsv": _separated("\t"), ".jsonl": _json_lines, ".parquet": _parquet}
