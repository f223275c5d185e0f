"""rms_norm: numbers against float64 and transformers, gradients, tracing, and what it refuses."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from torch import Tensor

from prunekern import _native
from prunekern.ops import rms_norm
from prunekern.ops.rms_norm import rms_norm_reference

EPS = 2.0**-24
OP = torch.ops.prunekern.rms_norm


def inputs(*shape, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(shape[-1])
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape[-1], generator=g, dtype=dtype)


def exact(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """In float64: (y, bound on the error of an fp32 result). 16 sums of n / 16 squares and the sum of these, the
    mean, eps, the root, the division and two products round once each; the root halves what came before it.
    """
    x, weight = x.double(), weight.double()
    y = weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y, EPS * ((x.shape[-1] / 16 + 18 + 3) / 2 + 4) * y.abs()


@pytest.mark.parametrize("n", [1, 5, 16, 372, 577])
@pytest.mark.parametrize("rows", [1, 5, 129])
def test_against_float64(rows, n):
    x, weight = inputs(rows, n)
    y, bound = exact(x, weight, 1e-5)
    strided = torch.cat([x, x], -1)[:, :n]
    turned = x.t().contiguous().t()
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag  # keeps its minus sign aside
    assert torch.equal(negative, x) and negative.is_neg()
    for one in (x, strided, turned, negative):
        for op in (rms_norm, OP):
            got = op(one, weight, 1e-5)
            assert got.shape == x.shape and got.is_contiguous() and bool(((got.double() - y).abs() <= bound).all())
    # PyTorch's own sum is a tree of at most n / 16 + 18 additions too.
    assert bool(((rms_norm_reference(x, weight, 1e-5).double() - y).abs() <= bound).all())
    sparse = torch.stack([weight, weight], 1)[:, 0]
    assert torch.equal(rms_norm(x, sparse, 1e-5), rms_norm(x, weight, 1e-5))
    got = rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(got, y, rtol=1e-14, atol=0)


def test_shapes_and_zeros():
    x, weight = inputs(2, 3, 4, 37)
    got = rms_norm(x, weight, 1e-6)
    assert got.shape == x.shape and torch.equal(got.view(-1, 37), rms_norm(x.view(-1, 37), weight, 1e-6))
    assert torch.equal(rms_norm(x[0, 0, 0], weight, 1e-6), got[0, 0, 0])
    moved = x.transpose(1, 2)
    assert torch.equal(rms_norm(moved, weight, 1e-6), got.transpose(1, 2))
    x[0] = 0
    assert torch.equal(rms_norm(x, weight, 1e-6)[0], torch.zeros(3, 4, 37))
    assert rms_norm(torch.zeros(0, 5), weight[:5], 1e-6).shape == (0, 5)
    assert rms_norm(torch.zeros(3, 0), weight[:0], 1e-6).shape == (3, 0)


def test_large_and_bad_values_stay_in_their_row():
    x, weight = inputs(4, 33)
    want = rms_norm(x, weight, 1e-6)
    x[1, 7], x[2, 30] = float("inf"), float("nan")
    got = rms_norm(x, weight, 1e-6)
    assert torch.equal(got[[0, 3]], want[[0, 3]]) and bool(got[1:3].isnan().any(-1).all())


def test_two_threads():
    torch.set_num_threads(2)  # conftest sets it back
    x, weight = inputs(301, 577)
    y, bound = exact(x, weight, 1e-5)
    assert bool(((rms_norm(x, weight, 1e-5).double() - y).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_transformers_norm(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = (t.to(dtype) for t in inputs(3, 5, 64))
    norm = LlamaRMSNorm(64, 1e-5).to(dtype)
    norm.weight.data = weight
    want, got = norm(x), rms_norm(x, weight, 1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=16 * EPS, atol=0)  # the sums are taken in another order
        assert torch.equal(rms_norm_reference(x, weight, 1e-5), want)
    else:
        assert got.dtype == dtype and torch.equal(got, want)


def test_the_core_runs(monkeypatch):
    assert _native.available(), _native.why_not()
    monkeypatch.setattr(importlib.import_module("prunekern.ops.rms_norm"), "rms_norm_reference", None)
    x, weight = inputs(3, 8)
    assert torch.equal(rms_norm(x, weight, 1e-6), OP(x, weight, 1e-6))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_gradcheck(shape):
    x, weight = inputs(*shape, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), [x.requires_grad_(), weight.requires_grad_()])


def test_gradients_are_those_of_the_reference():
    x, weight = inputs(4, 9, 33)
    for t in (x, weight):
        t.requires_grad_()
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), g)
    want = torch.autograd.grad(rms_norm_reference(x, weight, 1e-5), (x, weight), g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, weight = inputs(2, 3, 17)
    torch.library.opcheck(OP.default, (x.requires_grad_(grad), weight.requires_grad_(grad), 1e-5))


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(grad):
    x, weight = inputs(2, 3, 17)
    x.requires_grad_(grad)

    def f(x, weight):
        return rms_norm(x * 2, weight, 1e-5) + 1

    torch.compiler.reset()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(got, f(x, weight))
    if grad:
        ours, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, f(x, weight)))
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least 1 dimension (got a scalar)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, "x must be float64, float32"),
        ({"weight": torch.zeros(7)}, ValueError, "weight must have shape [8] (got [7])"),
        ({"weight": torch.zeros(1, 8)}, ValueError, "weight must have shape [8] (got [1, 8])"),
        ({"weight": torch.zeros(8, dtype=torch.int32)}, TypeError, "weight must be float64, float32"),
        ({"weight": torch.zeros(8, device="meta")}, ValueError, "weight is on meta, x on cpu"),
    ],
)
def test_refusals(change, error, text):
    args = {"x": torch.zeros(2, 8), "weight": torch.ones(8), "eps": 1e-6} | change
    with pytest.raises(error, match=re.escape(f"rms_norm: {text}")):
        rms_norm(**args)
