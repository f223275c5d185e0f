"""What a call of compact_linear must be like: shapes, dtypes, devices, indices; errors name the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .activations import ACTIVATIONS
from .packing import ELEMENT, check_panels, check_plain, check_scale

OP = "compact_linear"


def check_shapes(
    x: Tensor, packed: Tensor, n: int, k: int, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None,
    n_out: int, activation: str, residual: Tensor | None, scale: Tensor | None,
) -> None:  # fmt: skip
    """All that can be told without reading an index. n, k: what the weight makes and reads."""
    checks.activation(OP, activation, ACTIVATIONS)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least 1 dimension (got a scalar)")
    checks.floating(OP, "x", x)
    checks.dtypes(OP, x, {"packed": packed}, {"bias": bias}, residual)
    others = {"packed": packed, "bias": bias, "in_index": in_index, "out_index": out_index, "residual": residual}
    checks.same_device(OP, "x", x.device, **others)
    check_scale(OP, "scale", packed, n, scale)
    for name, index, length in (("in_index", in_index, k), ("out_index", out_index, n)):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{OP}: {name} must be int64 (got {index.dtype})")
        checks.shape(OP, name, index, (length,))
    if in_index is None and x.shape[-1] != k:
        raise ValueError(f"{OP}: x must have {k} channels, the weight's inputs (got {x.shape[-1]})")
    if out_index is None and n_out != n:
        raise ValueError(f"{OP}: n_out must be {n}, the weight's outputs, without out_index (got {n_out})")
    if bias is not None:
        checks.shape(OP, "bias", bias, (n,))
    if residual is not None:
        checks.shape(OP, "residual", residual, (*x.shape[:-1], n_out))


def check_plain_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None,
) -> None:  # fmt: skip
    n, k = check_plain(OP, "packed", weight, given_inputs(x, in_index))
    check_shapes(x, weight, n, k, bias, in_index, out_index, n_out, activation, residual, scale)
    check_indices(OP, in_index, x.shape[-1], out_index, n_out)


def check_indices(op: str, in_index: Tensor | None, width: int, out_index: Tensor | None, n_out: int) -> None:
    """ValueError or TypeError unless both hold kept channels, of `width` and of `n_out`."""
    for name, index, size in (("in_index", in_index, width), ("out_index", out_index, n_out)):
        if index is not None:
            checks.kept_index_anywhere(op, name, index, size)


def check_packed_call(
    x: Tensor, packed: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None,
) -> tuple[int, int]:  # fmt: skip
    n, k = sizes(x, packed, in_index, out_index, n_out)
    check_panels(OP, "packed", packed, n, k)
    check_shapes(x, packed, n, k, bias, in_index, out_index, n_out, activation, residual, scale)
    if x.dtype not in ELEMENT:
        raise TypeError(f"{OP}: x must be float32 or bfloat16 with a packed weight (got {x.dtype})")
    return n, k


def sizes(x: Tensor, packed: Tensor, in_index: Tensor | None, out_index: Tensor | None, n_out: int) -> tuple[int, int]:
    """Outputs and inputs of a packed weight. Panels of 16 bits and less pad inputs: there the caller's count stands."""
    n = n_out if out_index is None else out_index.numel()
    if packed.dim() == 3 and packed.dtype == torch.float32:
        return n, packed.shape[1]
    return n, given_inputs(x, in_index)


def given_inputs(x: Tensor, in_index: Tensor | None) -> int:
    """Inputs that a call gives to its weight."""
    if in_index is not None:
        return in_index.numel()
    return x.shape[-1] if x.dim() else 0
