"""layer_norm: against float64, and everything that stays PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prunekern.families.encoders.norms import CompactLayerNorm
from prunekern.ops.layer_norm import layer_norm
from tests.helpers.compact_linears import native


def bound_of(x, weight, bias, eps):
    """How far rounding can take y [..., n] from its exact value; x, weight, bias in float64.

    A sum over a row is 16 sums or more side by side, then those, so that no value goes through more than n / 16 + 36
    additions on any instruction set (csrc/kernels/layer_norm.h). With u = 2^-24 a rounding:
      mean: a u for each addition, relative to mean |x|, and one for the division.
      variance: what the mean is off by counts as its square only, as deviations add up to zero. Besides relative: a u
        for each addition, three for the difference, the square and the division. Its root has half of that.
      y: the difference, the root, its reciprocal and the product, one each; then weight and bias, two of what is added.
    """
    u, n = 2.0**-24, x.shape[-1]
    additions = min(n - 1, n // 16 + 36)
    mean = x.mean(-1, keepdim=True)
    off_mean = additions * u * x.abs().mean(-1, keepdim=True) + u * mean.abs() * bool(n & n - 1)  # 2^i divides exactly
    inverse = ((x - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    off_root = ((additions + 3) * u + (off_mean * inverse).square()) / 2  # relative
    normed = ((x - mean) * inverse).abs()
    off = off_mean * inverse + normed * (off_root + 4 * u)
    return 1.01 * (weight.abs() * off + 2 * u * (weight.abs() * normed + bias.abs()))  # 1.01: products of errors


@native
@pytest.mark.parametrize("n", [1, 5, 16, 577, 768])
def test_against_float64(n):
    torch.manual_seed(n)
    for x in (torch.randn(3, 7, n), torch.randn(1, n) * 100 + 30, torch.randn(4, n + 9)[:, 2 : n + 2], torch.randn(n)):
        weight, bias = torch.randn(n), torch.randn(n)
        exact = x.double(), weight.double(), bias.double()
        want = F.layer_norm(exact[0], (n,), *exact[1:], 1e-12)
        got = layer_norm(x, weight, bias, 1e-12)
        assert got.shape == x.shape and got.is_contiguous()
        assert ((got.double() - want).abs() <= bound_of(*exact, 1e-12)).all()


@native
def test_what_is_not_finite():
    x = torch.randn(4, 40)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = layer_norm(x, torch.ones(40), torch.zeros(40), 1e-5)
    assert y[1].isnan().all() and y[2].isnan().any() and y[[0, 3]].isfinite().all()


def test_what_stays_pytorchs():
    x, norm = torch.randn(3, 8), torch.nn.LayerNorm(8)
    norm.__class__ = CompactLayerNorm
    x.requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16):
            y = norm.to(dtype)(x.to(dtype))
            assert y.dtype == dtype and torch.equal(y, F.layer_norm(x.to(dtype), (8,), norm.weight, norm.bias))
        plain = torch.nn.LayerNorm(8, elementwise_affine=False)
        plain.__class__ = CompactLayerNorm
        assert torch.equal(plain(x), F.layer_norm(x, (8,)))
        two = torch.nn.LayerNorm((3, 8))
        two.__class__ = CompactLayerNorm
        assert torch.equal(two(x), F.layer_norm(x, (3, 8), two.weight, two.bias))
        compiled = torch.compile(norm.float(), fullgraph=True)
        torch.testing.assert_close(compiled(x), F.layer_norm(x, (8,), norm.weight, norm.bias))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.randn(3, 7))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        layer_norm(torch.randn(3, 7), torch.ones(8), torch.zeros(8), 1e-5)
