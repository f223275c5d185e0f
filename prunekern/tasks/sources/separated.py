"""CSV as RFC 4180 has it; TSV as it is published (GLUE), where a quotation mark is a character, or as CSV's sister."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..task import DataError
from .rows import Row, not_utf8, require

_QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a field as csv.writer quotes it


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a comma-separated file; a quoted field may hold commas and line breaks."""
    with _opened(path) as file:
        yield from _rows(path, _records(path, file, ","), columns)


def read_tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a tab-separated file. A line is a row and quotation marks are characters, unless `is_quoted`."""
    quoted = is_quoted(path)
    with _opened(path) as file:
        yield from _rows(path, _records(path, file, "\t") if quoted else _lines(path, file), columns)


def header(path: Path, delimiter: str) -> list[str]:
    """Names of the columns of a file with commas or tabs."""
    with _opened(path) as file:
        is_csv = delimiter == "," or is_quoted(path)
        _, names = next(_records(path, file, delimiter) if is_csv else _lines(path, file), (0, []))
    return names


def is_quoted(path: Path) -> bool:
    """Whether a tab-separated file was written by something that quotes fields as CSV does.

    It was where a column's name is quoted; where fields that begin with a quotation mark are all quoted whole, and all
    hold what needs it (a quotation mark, doubled); and where lines lack fields, but none does when read as CSV.
    """
    with _opened(path) as file:
        lines = (fields for _, fields in _lines(path, file))
        header = next(lines, [])
        if any(len(name) > 1 and _QUOTED.fullmatch(name) for name in header):
            return True
        marked = doubled = 0
        for fields in lines:
            if len(fields) != len(header):
                return _fits_quoted(path)
            for field in fields:
                if field.startswith('"'):
                    marked += 1
                    doubled += _QUOTED.fullmatch(field) is not None and '""' in field[1:-1]
    return 0 < marked == doubled


def _fits_quoted(path: Path) -> bool:
    """Whether every record has the header's number of fields, read as CSV."""
    with _opened(path) as file:
        try:
            return len({len(fields) for _, fields in _records(path, file, "\t")}) == 1
        except DataError:
            return False


def _opened(path: Path) -> TextIO:
    return open(path, encoding="utf-8-sig", newline="")


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1 and fields between tabs; blank lines are left out."""
    number = 0
    try:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield number, text.rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise _undecodable(path, error) from error


def _records(path: Path, file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line each record begins in, from 1, and its fields; blank lines are left out."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than csv's 131,072 characters
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    line = 0
    try:
        for record in reader:
            first, line = line + 1, reader.line_num  # a record starts after the last one's lines
            if record and (len(record) > 1 or record[0].strip()):
                yield first, record
    except csv.Error as error:
        raise DataError(f"{path} line {line + 1}: not valid CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise _undecodable(path, error) from error


def _rows(path: Path, records: Iterable[tuple[int, list[str]]], columns: Sequence[str]) -> Iterator[Row]:
    records = iter(records)
    _, header = next(records, (0, []))
    require(path, columns, header)
    chosen = [header.index(column) for column in columns]
    for line, record in records:
        where = f"{path} line {line}"
        if len(record) != len(header):
            raise DataError(f"{where}: {len(record)} fields, but the header names {len(header)}")
        yield Row(where, [record[index] or None for index in chosen])


def _undecodable(path: Path, error: UnicodeDecodeError) -> DataError:
    """Of the first line that is not UTF-8: text is decoded in blocks, whose errors do not tell."""
    with open(path, "rb") as file:
        begin = file.peek(8)[:8]
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError as at:
                return not_utf8(path, number, begin, at)
    return not_utf8(path, 0, begin, error)
