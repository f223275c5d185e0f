"""compact_linear written out in float64, with a bound on the error of an fp32 result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunekern import _native

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
EPS = 2.0**-24  # of fp32


def kept(count: int, size: int) -> Tensor:
    """`count` of 0 .. size - 1, ascending."""
    return torch.randperm(size)[:count].sort().values


def naive(
    x, weight, bias, in_index, out_index, n_out, activation, residual, torch_tails=False
) -> tuple[Tensor, Tensor]:
    """Written out channel by channel in float64: (y, bound on the error of an fp32 result).

    torch_tails: allow for the cancellation in 1 + erf(z) and 1 + tanh(z) of torch's own fp32 activations.
    """
    x, weight = x.double(), weight.double()
    read = x if in_index is None else x[..., in_index]
    z = read @ weight.T
    size = read.abs() @ weight.abs().T  # what rounding errors of the sum are relative to
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    phi = 0.5 * torch.erfc(-z / 2**0.5)
    a = {
        "none": z,
        "relu": z.clamp(min=0),
        "gelu": z * phi,
        "gelu_tanh": 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        "silu": z * torch.sigmoid(z),
        "quick_gelu": z * torch.sigmoid(1.702 * z),
    }[activation]
    # K + 1 roundings of the sum, an activation of slope under 1.2 and of 1e-6 own relative error.
    error = 1.2 * (weight.shape[1] + 1) * EPS * size + 1e-6 * a.abs()
    if torch_tails:
        error = error + 4 * EPS * z.abs()
    y = torch.zeros(*x.shape[:-1], n_out, dtype=torch.float64)
    bound = torch.zeros_like(y)
    for position in range(weight.shape[0]):
        channel = position if out_index is None else int(out_index[position])
        y[..., channel] = a[..., position]
        bound[..., channel] = error[..., position]
    if residual is not None:
        y = y + residual.double()
        bound = bound + EPS * y.abs()
    return y, bound


def assert_close(got: Tensor, y: Tensor, bound: Tensor) -> None:
    assert got.shape == y.shape
    excess = (got.double() - y).abs() - bound
    assert bool((excess <= 0).all()), f"off by {excess.max():.3g} more than rounding explains"
