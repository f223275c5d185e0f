"""The passes of `dora_linear` over [T, N] by element, on 16-bit tensors: in blocks of rows, in fp32, inside the cache.

Whole fp32 copies of 16-bit tensors are fresh memory each time: a [512, 3072] one is 6 MB of pages that the operating
system zeroes first, and no pass finds what the one before it left in the cache. What a training step costs under bf16
autocast, `python -m bench.cpu.train_step --bf16` says.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .flops import of_nothing
from .registering import register

BLOCK = 2**18  # elements of one fp32 block: 1 MB, of which two and the 16-bit rows are at work at once


def wide_dtype(gain: Tensor) -> torch.dtype:
    """What gain is multiplied and sums are taken in: fp32 (float64 where gain is)."""
    return torch.float64 if gain.dtype == torch.float64 else torch.float32


def gained(z: Tensor, gain: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gain * z + bias [T, N] in `dtype`; z [T, N]; gain, bias [N]; rounded once."""
    wide = wide_dtype(gain)
    gain, bias = gain.to(wide), None if bias is None else bias.to(wide)
    y = z.new_empty(z.shape, dtype=dtype)
    for rows, (block,) in _blocks(z, 1, wide):
        block.copy_(z[rows]).mul_(gain)
        y[rows] = block if bias is None else block.add_(bias)
    return y


def _backward(
    dy: Tensor, z: Tensor | None, gain: Tensor, bias: Tensor | None, products: torch.dtype,
    want_dz: bool, want_gain: bool, want_bias: bool, want_probe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dz [T, N] in `products`; the sums over rows of dy * z, dy and (dy * y)^2, [N]. What is not wanted is empty. z is
    read for the first and the last sum.
    """
    dz, *sums = _empty(dy, z, gain, bias, products, want_dz, want_gain, want_bias, want_probe)
    of_gain, of_bias, of_probe = (total.zero_() for total in sums)
    wide = of_gain.dtype
    gain, bias = gain.to(wide), None if bias is None else bias.to(wide)
    part = torch.empty_like(gain)
    for rows, (grad, other) in _blocks(dy, 2, wide):
        grad.copy_(dy[rows])
        if want_bias:
            of_bias.add_(torch.sum(grad, 0, out=part))
        if z is not None and want_gain:
            of_gain.add_(torch.sum(other.copy_(z[rows]).mul_(grad), 0, out=part))
        if z is not None and want_probe:
            other.copy_(z[rows]).mul_(gain)
            other = other if bias is None else other.add_(bias)
            of_probe.add_(torch.sum(other.mul_(grad).square_(), 0, out=part))
        if want_dz:
            dz[rows] = grad.mul_(gain)
    return dz, of_gain, of_bias, of_probe


def _empty(
    dy: Tensor, z: Tensor | None, gain: Tensor, bias: Tensor | None, products: torch.dtype,
    want_dz: bool, want_gain: bool, want_bias: bool, want_probe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, N = dy.shape
    wide = wide_dtype(gain)
    of_gain, of_bias, of_probe = (dy.new_empty(N if w else 0, dtype=wide) for w in (want_gain, want_bias, want_probe))
    return dy.new_empty((T, N) if want_dz else (0, N), dtype=products), of_gain, of_bias, of_probe


def _blocks(like: Tensor, count: int, dtype: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
    """Which rows, and `count` blocks of that many rows to work in: the same memory each time."""
    T, N = like.shape
    height = max(1, min(T, BLOCK // max(1, N)))
    work = [like.new_empty(height, N, dtype=dtype) for _ in range(count)]
    for start in range(0, T, height):
        end = min(start + height, T)
        yield slice(start, end), [block[: end - start] for block in work]


# An op: compiled graphs hold one node, not a loop unrolled for as many rows as they were traced with.
backward = register(
    "dora_linear_backward(Tensor dy, Tensor? z, Tensor gain, Tensor? bias, ScalarType products, bool want_dz, "
    "bool want_gain, bool want_bias, bool want_probe) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, flops=of_nothing, fake=_empty,
)  # fmt: skip
