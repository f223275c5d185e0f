"""What an adapter folder does not hold: the frozen tensors of its base model, known again by their checksums.

A tensor counts as the same where rounding it to bf16 gives the same bits: a base loaded in fp32 and one loaded in bf16
are then one base, and a row of new tokens that was drawn anew is not. fp16 rounds elsewhere; there, the sum of squares
has to be near.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MaskedDoRALinear
from ..nn.merging import ROWS

NEAR = 2**-7  # of a sum of squares: rounding to bf16 changes each square by less than half of it


def frozen_tensors(model: nn.Module, saved: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of an attached model that are not `saved`, by name, tied ones once.

    The weights of adapted layers are left out: their norms are known already (`Pruner.base_norms`).
    """
    adapted = {n for n, m in model.named_modules() if isinstance(m, MaskedDoRALinear)}
    shrunk = {n for n, m in model.named_modules() if getattr(m, "is_shrunk", False)}  # their indices are the plan's
    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name not in kept or name in saved or id(tensor) in seen:
            continue
        if owner in shrunk and leaf in ("rows", "cols"):
            continue
        if owner.removesuffix(".mask") not in adapted or (owner in adapted and leaf == "bias"):
            seen.add(id(tensor))
            yield name, tensor.detach()


def fingerprints(model: nn.Module, saved: Container[str]) -> dict[str, dict[str, Any]]:
    """Of every frozen tensor that is not `saved`: plain data. Empty for a model without storage."""
    return {name: fingerprint(t) for name, t in frozen_tensors(model, saved) if not t.is_meta}


def fingerprint(tensor: Tensor) -> dict[str, Any]:
    """shape, dtype, sum of squares (float64), and the CRC-32 of its values, as bf16 unless they are integers.

    A block of rows is held at a time, so that the tensor may be mapped from a file.
    """
    crc, squares = 0, 0.0
    for rows in tensor.detach().flatten(1).split(ROWS) if tensor.dim() > 1 else (tensor.detach().reshape(-1),):
        if rows.is_floating_point():
            squares += rows.double().square().sum().item()
            rows = rows.float().bfloat16().view(torch.int16)
        crc = zlib.crc32(rows.cpu().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "squares": squares, "crc": crc}


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same tensor, rounded at most."""
    if one["shape"] != other["shape"]:
        return False
    if one["crc"] == other["crc"]:
        return True
    rounded = (one["dtype"] == "float16") != (other["dtype"] == "float16")
    return rounded and bool(abs(one["squares"] - other["squares"]) <= NEAR * one["squares"])


def check_frozen(
    wanted: Mapping[str, Mapping[str, Any]], of: Callable[[str], Tensor | None], adapter: object
) -> None:  # fmt: skip
    """ValueError for the first tensor that is not what it was where the adapter was trained.

    wanted: its fingerprints. of(name): the tensor here, "meta" where it cannot be compared, None where there is none.
    """
    for name, there in wanted.items():
        tensor = of(name)
        if tensor is None:
            raise ValueError(f"{adapter}: was trained on another base model: there is no {name!r} here")
        if not tensor.is_meta:
            check_tensor(name, tensor, there, adapter)


def check_tensor(name: str, tensor: Tensor, there: Mapping[str, Any], adapter: object) -> None:
    """As `check_frozen`, of one tensor. there: its fingerprint where the adapter was trained."""
    if list(tensor.shape) != there["shape"]:
        raise ValueError(
            f"{adapter}: was trained on another base model: {name!r} has shape {there['shape']} there, "
            f"{list(tensor.shape)} here{_HINT}"
        )
    if not is_same(there, fingerprint(tensor)):
        raise ValueError(
            f"{adapter}: was trained on another base model: {name!r} has other values there than here{_HINT}"
        )


_HINT = (
    "; where the model was changed before it was trained (tokens added, say), save it as a base of its own, or its "
    "embeddings with the adapter: save_adapter(..., save_embeddings=True)"
)


def is_fingerprints(data: object) -> bool:
    """Whether what was read from a file is what `fingerprints` gives."""
    return isinstance(data, dict) and all(
        isinstance(f, dict)
        and isinstance(f.get("shape"), list)
        and isinstance(f.get("dtype"), str)
        and type(f.get("squares")) in (int, float)
        and type(f.get("crc")) is int
        for f in data.values()
    )
