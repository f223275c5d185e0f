"""One word a line with its tag, a blank line between sentences: how data of the CoNLL shared tasks is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..task import DataError
from .readers import check_file
from .rows import Row, not_utf8

EXTENSIONS = (".conll", ".iob", ".bio", ".txt", ".tsv")
ALWAYS = (".conll", ".iob", ".bio")  # nothing else is written in these
_DOCUMENT = "-DOCSTART-"  # a line of its own between documents


def read_conll(path: Path) -> Iterator[Row]:
    """A row for each sentence: its words, and its tags. Its place is that of its first line.

    The word is a line's first column and the tag its last, tabs between them, or blanks where the first line has no
    tab. Among tabs, a line without one that begins with "#" is a comment.
    Raises FileNotFoundError; ValueError for an extension not in EXTENSIONS; DataError for an empty file, a line with
    another number of columns than the first, or with one only, a blank word or tag, a file that is not UTF-8.
    """
    check_file(path, EXTENSIONS)
    words: list[str] = []
    tags: list[str] = []
    first = width = count = 0
    separator = _separator(path)
    for number, line in _lines(path):
        if not line.strip():
            if words:
                count += 1
                yield Row(f"{path} line {first}", [words, tags])
                words, tags = [], []
            continue
        if separator == "\t" and line.startswith("#") and "\t" not in line:
            continue
        columns = [column.strip(" ") for column in line.split(separator)]
        if separator == " ":
            columns = [column for column in columns if column]  # several blanks are one
        if columns[0] == _DOCUMENT:
            continue
        width = width or len(columns)
        where = f"{path} line {number}"
        if len(columns) < 2:
            raise DataError(f"{where}: one column only (got {line.strip()!r}); expected a word, a tab and its tag")
        if len(columns) != width:
            raise DataError(f"{where}: {len(columns)} columns, but the first line has {width}")
        for what, column in (("word", columns[0]), ("tag", columns[-1])):
            if not column.strip():
                raise DataError(f"{where}: {what} is blank")
        if not words:
            first = number
        words.append(columns[0])
        tags.append(columns[-1])
    if words:
        count += 1
        yield Row(f"{path} line {first}", [words, tags])
    if count == 0:
        raise DataError(f"data file {path} has no rows")


def _separator(path: Path) -> str:
    """A tab where the first line that is no comment has one, else a blank."""
    first = next((line for _, line in _lines(path) if line.strip() and not line.startswith(("#", _DOCUMENT))), "")
    return "\t" if "\t" in first else " "


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        begin = file.peek(8)[:8]
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise not_utf8(path, number, begin, error) from error
