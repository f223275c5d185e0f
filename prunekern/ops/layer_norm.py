"""layer_norm: PyTorch's, by the C++ kernel where it is an ordinary call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern import _native

from . import calls

# csrc/python/norm.cpp; it gives None for a call that it leaves to PyTorch.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call_layer_norm if calls.EAGER else None
_f32 = torch.float32


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = weight * (x - mean) / sqrt(variance + eps) + bias over the last dimension: `F.layer_norm`.

    x: [..., n]; weight, bias: [n] or None. On the CPU, in float32, where nothing wants a gradient and nobody looks on,
    the C++ kernel runs: 0.15 us a row of 768 where PyTorch's takes 0.31 (EPYC, 1,024 rows). Anything else is
    PyTorch's own, with its errors.
    """
    if _EAGER and x.dtype is _f32 and calls.short() and not calls.needs_grad(x, weight, bias):
        y = _EAGER(x, weight, bias, eps, calls.threads())
        if y is not None:
            return y
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
