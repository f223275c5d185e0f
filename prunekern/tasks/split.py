"""A deterministic split that no duplicate straddles."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence

from .task import DataError

_WORD = re.compile(r"\w+")


def text_key(*texts: str) -> str:
    """Two rows with the same key are duplicates: case, punctuation and spacing do not tell texts apart.

    A text without any word in it ("!!!") counts as itself.
    """
    return "\x1f".join(" ".join(_WORD.findall(text.casefold())) or text.strip() for text in texts)


def grouped_split(keys: Sequence[str], sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Row indices of "train" and of every split in `sizes`, all of a key in one split.

    keys: one per row (`text_key`). sizes: rows wanted per split, filled in the order of the mapping; the rest
    is "train". A split stays short of its size only if every key left has too many rows to fit.
    Keys are visited in the order of their sha256: a random order that depends on nothing but the key, so it
    is the same on every machine and version, and adding rows elsewhere in the file hardly moves anything.
    Each split comes out in that order, so its first n rows are a random sample even of a sorted file.
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    out: dict[str, list[int]] = {name: [] for name in sizes}
    out["train"] = []
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    for key in order:
        rows = groups[key]
        room = (name for name, size in sizes.items() if len(out[name]) + len(rows) <= size)
        out[next(room, "train")].extend(rows)
    return out


def check_shares(what: str, validation_share: float, test_share: float) -> None:
    """Raises ValueError unless both are in (0, 1)."""
    for name, share in (("validation_share", validation_share), ("test_share", test_share)):
        if not 0 < share < 1:
            raise ValueError(f"{what}: {name} must be in (0, 1) (got {share})")


def draw(path: str | os.PathLike[str], keys: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[int]]:
    """Row indices of "train" and of every split in `shares`, by `grouped_split`.

    path: the file of the rows, for the error. shares: of the rows, above 0; at least one row each. Raises DataError
    when a split comes out empty.
    """
    parts = grouped_split(keys, {name: max(1, round(share * len(keys))) for name, share in shares.items()})
    for name, indices in parts.items():
        if not indices:
            raise DataError(
                f"data file {path}: {len(keys)} rows ({len(set(keys))} distinct texts) are too few to draw "
                f"{' and '.join(shares)} from: {name} came out empty"
            )
    return parts
