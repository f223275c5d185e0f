"""A deterministic split that no duplicate straddles."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

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
