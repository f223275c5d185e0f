"""What a safetensors file says it holds, checked before anything reads it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable

from torch import nn

from .plan import Plan


def read_header(file: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], int, int]]:
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


def check_tensors(model: nn.Module, plan: Plan, files: Iterable[str]) -> None:
    """ValueError unless the files hold every block weight and bias of the plan, in its kept shape."""
    files = [str(f) for f in files]
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored.update({name: entry[0] for name, entry in read_header(file).items()})
    where = files[0] if len(files) == 1 else os.path.dirname(files[0])
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, layer in plan.layers.items():
        wanted = {"weight": (layer.rows.numel(), layer.cols.numel())}
        if layer.bias:
            wanted["bias"] = (layer.rows.numel(),)
        for part, shape in wanted.items():
            tensor = f"{name}.{part}"
            # A headless checkpoint under a model with a head, or the other way round: the prefix comes and goes.
            got = next((stored[t] for t in (tensor, tensor.removeprefix(prefix), prefix + tensor) if t in stored), None)
            if got is None:
                raise ValueError(f"{where}: tensor {tensor!r} is missing")
            if got != shape:
                raise ValueError(
                    f"{where}: tensor {tensor!r} must have shape {list(shape)} by the plan (got {list(got)})"
                )
