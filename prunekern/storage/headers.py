"""What a safetensors file says it holds, checked before anything reads it."""

from __future__ import annotations

import json
import os
import struct


def read_header(file: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Shapes and byte ranges of a safetensors file's tensors. ValueError for one that is truncated or malformed."""
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file}: is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    entries[name] = tuple(int(n) for n in entry["shape"]), int(first), int(last)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: has a malformed safetensors header ({error})") from None
    end = max((e[2] for e in entries.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{file}: is truncated or padded: its header asks for {8 + length + end} bytes, it has {size}")
    return entries
