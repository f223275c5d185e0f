"""How `compact_linear` runs on a GPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern import kernels

from . import checks
from .flops import count, linear_flops


def run_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The Triton kernels, or the vendor's product where there is nothing to fuse. Checked arguments, on a GPU."""
    x, in_index, (weight,) = lined_up(x, in_index, weight)
    if in_index is None and out_index is None and activation == "none" and weight.dtype == x.dtype:
        with checks.without_autocast(x.device):
            y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return y if residual is None else y.add_(residual)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(math.prod(x.shape[:-1]), 0)
    added = None if residual is None else residual.reshape(rows.shape[0], n_out)
    with checks.without_autocast(x.device):
        y = triton_op()(rows, weight, bias, in_index, out_index, n_out, activation, added, scale)
    return y.view(*x.shape[:-1], n_out)


GATHER_ROWS, PAD_ROWS = 64, 512  # from so many rows on
STEP = 16  # inputs that whole 16-byte loads go into, whatever the dtype


def lined_up(x: Tensor, in_index: Tensor | None, *weights: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The same products with their inputs side by side, and a multiple of STEP of them, where many rows pay for it.

    Every block of columns reads x again: gathered loads are of one element each, and so are those of a width that is no
    multiple of 16 bytes. One pass over x costs less. Zero weights meet what pads x: zeros, or a kept channel again.
    """
    rows, K = x.numel() // max(1, x.shape[-1]), weights[0].shape[1]
    short = -K % STEP if rows >= PAD_ROWS else 0
    if K == 0 or not (short or (in_index is not None and rows >= GATHER_ROWS)):
        return x, in_index, weights
    if short:
        weights = tuple(F.pad(weight, (0, short)) for weight in weights)
    if in_index is None:
        return F.pad(x, (0, short)), None, weights
    if short:
        in_index = torch.cat([in_index, in_index[-1:].expand(short)])
    return x.index_select(-1, in_index), None, weights


@functools.cache
def triton_op() -> Callable[..., Tensor]:
    """`prunekern::compact_linear_triton`, registered when first asked for."""
    from ..kernels.compact_linear import compact_linear as launch

    def compact_linear_triton(
        x: Tensor, W: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
        activation: str, residual: Tensor | None, scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return launch(x, W, bias, in_index, out_index, n_out, activation, residual, scale)

    op = torch.library.triton_op("prunekern::compact_linear_triton", compact_linear_triton, mutates_args=())
    count("compact_linear_triton", linear_flops)
    return op


kernels.register_early(triton_op)
