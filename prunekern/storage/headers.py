"""What a safetensors file says it holds, checked before anything reads it."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import Any

# Bits of a value, by safetensors' names.
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def read_header(file: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], int, int, str]]:
    """Shapes, byte ranges and dtypes (by safetensors' names: F32, I8) of a safetensors file's tensors.

    ValueError, naming the file, for one that is truncated or malformed: a dtype that is none, sizes that are no whole
    numbers, ranges that do not fit them, overlap or leave a gap.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file}: is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            entries = {name: _entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
        except RecursionError:
            raise ValueError(f"{file}: has a malformed safetensors header (nested too deep)") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: has a malformed safetensors header ({error})") from None
    end = 0
    for name, (_, first, last, _) in sorted(entries.items(), key=lambda item: item[1][1:3]):
        if first != end:
            raise ValueError(f"{file}: has a malformed safetensors header ({name} begins at {first}, not at {end})")
        end = last
    if 8 + length + end != size:
        raise ValueError(f"{file}: is truncated or padded: its header asks for {8 + length + end} bytes, it has {size}")
    return entries


def _entry(name: str, entry: dict[str, Any]) -> tuple[tuple[int, ...], int, int, str]:
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    for number in (*shape, first, last):
        if type(number) is not int or number < 0:
            raise ValueError(f"{name}: sizes and offsets must be whole numbers (got {number!r})")
    bits = _BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"{name}: dtype {entry['dtype']!r} is unknown")
    if 8 * (last - first) != math.prod(shape) * bits:
        raise ValueError(f"{name}: {last - first} bytes do not hold {list(shape)} of {entry['dtype']}")
    return tuple(shape), first, last, entry["dtype"]
