"""Rows of named columns out of CSV, JSON and parquet files, each with its place for error messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..task import DataError
from .rows import Row, not_utf8, require
from .separated import header, read_csv, read_tsv


def read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a file, in its order. Values as the file holds them; in CSV strings, an empty field being null.

    Raises FileNotFoundError for a file that is not there; ValueError for an extension not in READERS;
    DataError for an empty file, a missing column (naming those there are), a malformed line, a file that is
    not UTF-8.
    """
    reader = READERS[check_file(path, READERS)]
    count = 0
    for row in reader(path, columns):
        count += 1
        yield row
    if count == 0:
        raise DataError(f"data file {path} has no rows")


def column_names(path: Path) -> list[str]:
    """Names of a file's columns, of JSON those of the first row. Raises as `read`."""
    extension = check_file(path, READERS)
    if extension == ".parquet":
        return [name for name in _schema(path).names]
    if extension in (".csv", ".tsv"):
        return header(path, "," if extension == ".csv" else "\t")
    return list(next(_objects(path), ("", {}))[1])


def check_file(path: Path, accepted: Iterable[str]) -> str:
    """The file's extension, in small letters. Raises FileNotFoundError; ValueError for another; DataError where it is
    empty.
    """
    extension = path.suffix.lower()
    if extension not in accepted:
        raise ValueError(f"data file {path}: extension must be one of {', '.join(accepted)} (got {path.suffix!r})")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"data file {path} {what}")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty")
    return extension


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError where a name is there twice: Python would take the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise ValueError(f"the name {twice!r} is there twice")
    return found


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for place, (where, record) in enumerate(_objects(path)):
        if place == 0:
            require(path, columns, list(record))
        for column in columns:
            if column not in record:
                listed = ", ".join(record) or "none"
                raise DataError(f"{where}: column {column!r} is missing; there are {listed}")
        yield Row(where, [record[column] for column in columns])


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each object: one on every line, or, of a .json file that begins so, in one list."""
    if path.suffix.lower() == ".json" and _is_list(path):
        yield from _listed(path)
        return
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path} line {line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text, object_pairs_hook=_once)
            except UnicodeDecodeError as error:
                raise not_utf8(path, line, raw, error) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error}); expected an object on every line") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}; every line is one")
            yield where, record


def _is_list(path: Path) -> bool:
    """Whether the first character that is no blank, or byte order mark, is a bracket."""
    with open(path, "rb") as file:
        for raw in file:
            text = raw.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                return text.startswith(b"[")
    return False


def _listed(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    raw = path.read_bytes()
    try:
        records = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise not_utf8(path, raw.count(b"\n", 0, error.start) + 1, raw, error) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data file {path}: not JSON ({error}); expected a list of objects") from error
    for row, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path} row {row}: expected a JSON object, got {type(record).__name__}; every row is one")
        yield f"{path} row {row}", record


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require(path, columns, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=list(columns)):
                lists = [batch.column(column).to_pylist() for column in columns]
                for values in zip(*lists, strict=True):
                    row += 1
                    yield Row(f"{path} row {row}", list(values))
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"data file {path} cannot be read as parquet: {reason}") from error


def _schema(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"data file {path} cannot be read as parquet: {reason}") from error


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
}
