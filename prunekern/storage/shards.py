"""Safetensors files of a checkpoint, read and written one tensor at a time."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .headers import read_header
from .json_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def has_safetensors(folder: Path) -> bool:
    """Whether a model folder holds its weights as safetensors, in one file or in several."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


class Shards:
    """Tensors of safetensors files by name; a file is mapped only while a tensor of it is in use.

    `where`: the file, or the index of several. `files`, `shapes`, `dtypes` (F32, I8, ...): of every tensor. Made of
    headers alone; each file's length is checked against its header.
    """

    def __init__(self, where: Path, files: Mapping[str, Path]):
        self.where, self.files = where, dict(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._stored: dict[str, str] = {}  # by name, that in the file where it is another
        headers = {file: read_header(file) for file in sorted(set(self.files.values()))}
        for name, file in self.files.items():
            if name not in headers[file]:
                raise ValueError(f"{file}: tensor {name!r} is missing, {where.name} says it is here")
            self.shapes[name], _, _, self.dtypes[name] = headers[file][name]

    @classmethod
    def of_file(cls, file: Path) -> Shards:
        return cls(file, dict.fromkeys(read_header(file), file))

    @classmethod
    def of_model(cls, folder: Path) -> Shards:
        """Of a model folder: model.safetensors, or else what its index names.

        FileNotFoundError where there is neither, or a shard is missing; ValueError for a damaged file or index, and
        for weights that are in .bin files only.
        """
        if (folder / SINGLE).is_file():
            return cls.of_file(folder / SINGLE)
        index = folder / INDEX
        if not index.is_file():
            pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
            if pickled:
                raise ValueError(f"{folder / pickled[0]}: is no safetensors file; load the model and save it once")
            raise FileNotFoundError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(n, str) and Path(n).name == n for n in named.values()):
            raise ValueError(f"{index}: weight_map must name a file of this folder for every tensor")
        for shard in sorted(set(named.values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder / shard}: no such file, {INDEX} names it")
        return cls(index, {tensor: folder / shard for tensor, shard in named.items()})

    def renamed(self, rename: Callable[[str], str]) -> Shards:
        """The same tensors by other names."""
        twin = copy.copy(self)
        twin._stored = {rename(name): self._stored.get(name, name) for name in self.files}
        twin.files = {rename(name): file for name, file in self.files.items()}
        twin.shapes = {rename(name): shape for name, shape in self.shapes.items()}
        twin.dtypes = {rename(name): dtype for name, dtype in self.dtypes.items()}
        return twin

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: it takes no memory of its own, and must not be written to."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(self._stored.get(name, name))
                return tensor
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]}: tensor {name!r} cannot be read ({error})") from None

    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor of the first file, which transformers takes for the model's."""
        first = min(self.files.values(), default=None)
        for name, file in self.files.items():
            if file == first and (dtype := self.read(name).dtype).is_floating_point:
                return dtype
        raise ValueError(f"{first or self.where}: holds no floating-point tensor")


def write_shard(file: Path, tensors: Mapping[str, Tensor], parts: Callable[[str], Iterable[Tensor]]) -> None:
    """A safetensors file, byte for byte what `safetensors.torch.save_file` makes, without holding what is in it.

    tensors: shapes and dtypes by name ("meta" will do). parts(name): the values of a tensor, in pieces that follow one
    another in memory; it is asked once for each tensor, in the file's order.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))  # wide dtypes first: all are then aligned
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        first, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            first, end = header[name]["data_offsets"]
            written = _write(out, parts(name))
            assert written == end - first, f"{name}: {written} bytes instead of {end - first}"


def _write(out: BinaryIO, parts: Iterable[Tensor]) -> int:
    """Bytes written. A function of its own, so that no part outlives it: the next tensor would be made beside it."""
    written = 0
    for part in parts:
        if part.numel():
            written += out.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return written
