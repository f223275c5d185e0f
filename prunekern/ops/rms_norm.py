"""rms_norm: the root mean square norm of LLaMA and its relatives, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekern import _native

from . import calls, checks
from .flops import of_nothing
from .registering import register

OP = "rms_norm"
_RUN: Callable[..., None] | None = _native.core().rms_norm if _native.available() else None
# csrc/python/norm.cpp; it gives None for a call that it leaves to the op.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call_norm if calls.EAGER else None
_f32 = torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight * (x / sqrt(mean(x^2) + eps)), the mean over the last dimension.

    Schema: `prunekern::rms_norm(Tensor x, Tensor weight, float eps) -> Tensor`. Source: Zhang and Sennrich 2019, in the
    order of transformers' LlamaRMSNorm: x is divided in float32, rounded to its own dtype, then multiplied.

    Args:
        x: [..., n], any strides; float64 computes in float64, float32, bfloat16 and float16 in float32.
        weight: [n], any floating dtype.
        eps: added to the mean square.

    Returns y, contiguous, of x's shape and dtype; a row of zeros gives zeros where eps > 0. On the CPU, in float32 and
    where no gradient is needed, the C++ loop runs: 2 us a row of 576 where PyTorch's six calls take 40. Anything else
    runs the PyTorch reference. Differentiable in x and weight. Raises ValueError (shapes, devices) or TypeError
    (dtypes), naming the argument.
    """
    if _EAGER and calls.short() and not calls.needs_grad(x, weight):
        y = _EAGER(x, weight, eps, calls.threads())
        if y is not None:
            return y
    checks.tensors(OP, {"x": x, "weight": weight}, {})
    if calls.transformed():
        _check(x, weight, eps)
        return rms_norm_reference(x, weight, eps)
    normed: Tensor = torch.ops.prunekern.rms_norm(x, weight, eps)
    return normed


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain PyTorch; differentiable; never calls the C++ core."""
    h, _ = _normed(x, eps)
    return (weight * h.to(x.dtype)).to(x.dtype)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) and 1 / sqrt(mean(x^2) + eps) [..., 1], in what is computed in."""
    x = x.to(checks.compute_dtype(x))
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * inverse, inverse


# --- checks and the C++ path ------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"{OP}: eps must be finite and not negative (got {eps})")
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least 1 dimension (got a scalar)")
    for name, tensor in (("x", x), ("weight", weight)):
        checks.floating(OP, name, tensor)
    checks.shape(OP, "weight", weight, (x.shape[-1],))
    checks.same_device(OP, "x", x.device, weight=weight)


def _run(run: Callable[..., None], x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The C++ loop on float32 tensors of the CPU."""
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        return y
    kept, address, stride = calls.rows(x)  # kept: the address is worth nothing without its tensor
    weight = calls.plain_memory(weight)
    n = x.shape[-1]
    run(y.numel() // n, n, address, stride, weight.data_ptr(), eps, y.data_ptr(), calls.threads())
    return y


# --- registration -----------------------------------------------------------------------------------------------

_SCHEMA = "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    if not x.is_cpu or x.dtype is not _f32 or weight.dtype is not _f32 or _RUN is None:
        return rms_norm_reference(x, weight, eps).contiguous()
    return _run(_RUN, x, weight, eps)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check(x, weight, eps)
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """h = x / rms: dx = (g - h mean(g h)) / rms with g = weight * grad; dweight = sum of grad * h."""
    x, weight = ctx.saved_tensors
    h, inverse = _normed(x, ctx.eps)
    grad, d_x, d_weight = grad.to(h.dtype), None, None
    if ctx.needs_input_grad[0]:
        g = grad * weight.to(h.dtype)
        d_x = ((g - h * (g * h).mean(-1, keepdim=True)) * inverse).to(x.dtype)
    if ctx.needs_input_grad[1]:
        d_weight = (grad * h).flatten(0, -2).sum(0) if h.dim() > 1 else grad * h
        d_weight = d_weight.to(weight.dtype)
    return d_x, d_weight, None


register(_SCHEMA, _forward, flops=of_nothing, fake=_fake, backward=_backward, setup_context=_setup_context)
