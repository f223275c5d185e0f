"""Flags in a JSON: which test texts were answered right, which channel groups are kept. A bit each, as hexadecimal."""

from __future__ import annotations

import numpy as np


def packed(flags) -> str:
    """flags: booleans [n], an array or a CPU tensor."""
    return np.packbits(np.asarray(flags, dtype=bool)).tobytes().hex()


def unpacked(text: str, count: int | None = None) -> np.ndarray:
    """bool [count]; None: all there are, a multiple of eight."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
