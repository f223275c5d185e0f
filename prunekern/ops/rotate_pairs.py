"""rotate_pairs: rotary positions on heads that keep rotary pairs of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekern import _native

from . import calls, checks
from .flops import of_nothing
from .registering import register

OP = "rotate_pairs"
_RUN: Callable[..., None] | None = _native.core().rotate_pairs if _native.available() else None
# csrc/python/rotary.cpp; it gives None for a call that it leaves to the op.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call_rotary if calls.EAGER else None
_f32 = torch.float32


def rotate_pairs(
    x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int = 1
) -> Tensor:
    """y = every rotary pair (a, b) of x turned by its angle: (a cos - b sin, b cos + a sin).

    Schema: `prunekern::rotate_pairs(Tensor x, Tensor cos, Tensor sin, Tensor angle, int[] first, int shared_by) ->
    Tensor`. Source: rotary position embedding (Su et al. 2021), pairs half a head apart as in LLaMA.

    Args:
        x: [batch, tokens, shared_by C], any strides; float64 computes in float64, float32, bfloat16 and float16 in
            float32.
        cos, sin: [batch or 1, tokens, angles], any floating dtype.
        angle: int64 [C / 2], in 0..angles - 1: which angle turns each pair, head by head.
        first: heads + 1 even ints, ascending from 0 to C: head h has channels first[h] to first[h + 1], first halves
            of its pairs before second halves.
        shared_by: query heads of each key/value head, which are turned alike; they stand side by side, from
            shared_by first[h] on. 1 for keys.

    Returns y, contiguous, of x's shape and dtype. On the CPU, in float32 and where no gradient is needed, the C++ loop
    runs; anything else runs the PyTorch reference. Differentiable in x. Raises ValueError (shapes, devices) or
    TypeError (dtypes), naming the argument.
    """
    if _EAGER and calls.short() and not calls.needs_grad(x):
        y = _EAGER(x, cos, sin, angle, first, shared_by, calls.threads())
        if y is not None:
            return y
    checks.tensors(OP, {"x": x, "cos": cos, "sin": sin, "angle": angle}, {})
    if calls.transformed():
        _check(x, cos, sin, angle, first, shared_by)
        return rotate_pairs_reference(x, cos, sin, angle, first, shared_by)
    turned: Tensor = torch.ops.prunekern.rotate_pairs(x, cos, sin, angle, first, shared_by)
    return turned


def rotate_pairs_reference(
    x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int = 1
) -> Tensor:
    """The same in plain PyTorch, head by head; differentiable; never calls the C++ core."""
    dtype = checks.compute_dtype(x)
    out, x = x.dtype, x.to(dtype)
    cos, sin = (t.to(dtype).index_select(-1, angle) for t in (cos, sin))  # [batch or 1, tokens, C / 2]
    parts = []
    for begin, end in zip(first, first[1:], strict=False):
        half, own = (end - begin) // 2, slice(begin // 2, end // 2)
        for i in range(shared_by):
            a, b = x.narrow(-1, shared_by * begin + 2 * i * half, 2 * half).chunk(2, -1) if half else (x[..., :0],) * 2
            c, s = cos[..., own], sin[..., own]
            parts += [a * c - b * s, b * c + a * s]
    return (torch.cat(parts, -1) if parts else x.new_zeros(x.shape)).to(out)


# --- checks and the C++ path ------------------------------------------------------------------------------------


def _check(x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int) -> None:
    checks.shape(OP, "x", x, (None, None, None))
    checks.floating(OP, "x", x)
    batch, tokens, channels = x.shape
    if shared_by < 1 or channels % shared_by:
        raise ValueError(f"{OP}: shared_by must divide the {channels} channels of x (got {shared_by})")
    channels //= shared_by
    for name, table in (("cos", cos), ("sin", sin)):
        checks.floating(OP, name, table)
        checks.shape(OP, name, table, (None, tokens, cos.shape[-1]))
        if table.shape[0] not in (1, batch):
            raise ValueError(f"{OP}: {name} must have 1 or {batch} sequences like x (got {table.shape[0]})")
    checks.same_device(OP, "x", x.device, cos=cos, sin=sin, angle=angle)
    steps = [b - a for a, b in zip(first, first[1:], strict=False)]
    if not first or first[0] != 0 or first[-1] != channels or any(n < 0 or n % 2 for n in steps):
        raise ValueError(
            f"{OP}: first must ascend from 0 to {channels}, the channels there are, in even steps (got {list(first)})"
        )
    if angle.dtype != torch.int64:
        raise TypeError(f"{OP}: angle must be int64 (got {angle.dtype})")
    checks.shape(OP, "angle", angle, (channels // 2,))


def _check_values(angle: Tensor, angles: int) -> None:
    if angle.numel() and not (0 <= int(angle.min()) and int(angle.max()) < angles):
        raise ValueError(f"{OP}: angle must be in 0..{angles - 1} (got {int(angle.min())} to {int(angle.max())})")


def _run(
    run: Callable[..., None], x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int
) -> Tensor:  # fmt: skip
    """The C++ loop on float32 tensors of the CPU."""
    x, cos, sin = (t if t.stride(2) == 1 and not t.is_neg() else t.resolve_neg().contiguous() for t in (x, cos, sin))
    angle, y = angle.contiguous(), x.new_empty(x.shape)
    tables = [(t.data_ptr(), (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1))) for t in (cos, sin)]
    run(
        x.shape[0], x.shape[1], first, shared_by, x.data_ptr(), x.stride()[:2], *tables[0], *tables[1], cos.shape[2],
        angle.data_ptr(), y.data_ptr(), calls.threads(),
    )  # fmt: skip
    return y


# --- registration -----------------------------------------------------------------------------------------------

_SCHEMA = "rotate_pairs(Tensor x, Tensor cos, Tensor sin, Tensor angle, int[] first, int shared_by) -> Tensor"


def _forward(x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int) -> Tensor:
    _check(x, cos, sin, angle, first, shared_by)
    if x.is_cpu:
        _check_values(angle, cos.shape[-1])  # on a GPU, index_select says so
    if not x.is_cpu or x.dtype is not _f32 or _RUN is None:
        return rotate_pairs_reference(x, cos, sin, angle, first, shared_by).contiguous()
    return _run(_RUN, x, cos.float(), sin.float(), angle, first, shared_by)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, angle: Tensor, first: Sequence[int], shared_by: int) -> Tensor:
    _check(x, cos, sin, angle, first, shared_by)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, angle, ctx.first, ctx.shared_by = inputs
    ctx.constant = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
    ctx.save_for_backward(cos, sin, angle)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.constant:
        raise RuntimeError(f"{OP}: cos and sin must not require a gradient; none is formed for them")
    cos, sin, angle = ctx.saved_tensors
    turned_back = torch.ops.prunekern.rotate_pairs(grad, cos, -sin, angle, ctx.first, ctx.shared_by)
    return turned_back, None, None, None, None, None


register(_SCHEMA, _forward, flops=of_nothing, fake=_fake, backward=_backward, setup_context=_setup_context)
