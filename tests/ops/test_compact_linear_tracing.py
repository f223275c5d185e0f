"""compact_linear: gradients, compile and opcheck, and the short way past the dispatcher."""

from __future__ import annotations

import sys

import pytest
import torch

from prunekern.ops import compact_linear, pack_weight, unpack_weight
from prunekern.ops.compact_linear import ACTIVATIONS
from tests.helpers.compact_linears import EPS, assert_close, kept, naive, native


def plain_arguments(activation: str, dtype=torch.float64, scatter: bool = True) -> tuple:
    """Arguments of the op on a plain weight, all that can require a gradient does."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=True)  # noqa: E731
    out_index, n_out = (torch.tensor([0, 2, 3]), 5) if scatter else (None, 3)
    return (make(2, 4, 6), make(3, 4), make(3), torch.tensor([0, 1, 3, 5]), out_index, n_out, activation,
            make(2, 4, n_out))  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("function", [compact_linear, torch.ops.prunekern.compact_linear], ids=["eager", "op"])
def test_gradcheck(function, activation):
    args = plain_arguments(activation)
    assert torch.autograd.gradcheck(lambda x, w, b, r: function(x, w, b, *args[3:7], r), (*args[:3], args[7]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck_plain(activation):
    for dtype in (torch.float64, torch.float32):
        for scatter in (True, False):
            torch.library.opcheck(torch.ops.prunekern.compact_linear, plain_arguments(activation, dtype, scatter))
    torch.library.opcheck(
        torch.ops.prunekern.compact_linear, (torch.randn(4, 6), torch.randn(3, 6), None, None, None, 3, "none", None)
    )


@native
def test_opcheck_packed():
    packed = pack_weight(torch.randn(40, 12))
    args = (torch.randn(3, 12), packed, torch.randn(40), None, kept(40, 90), 90, "gelu", torch.randn(3, 90))
    torch.library.opcheck(torch.ops.prunekern.compact_linear, args)


@pytest.mark.parametrize("is_packed", [False, pytest.param(True, marks=native)])
def test_compile_fullgraph(is_packed):
    weight, out_index = torch.randn(40, 12), kept(40, 90)
    form = pack_weight(weight) if is_packed else weight

    def block(x, residual):
        return compact_linear(x * 2, form, None, None, out_index, 90, "gelu", residual) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for m in (1, 3, 17):
        x, residual = torch.randn(m, 12), torch.randn(m, 90)
        y, bound = naive(2 * x, weight, None, None, out_index, 90, "gelu", residual)
        assert_close(compiled(x, residual), y + 1, bound + EPS * (y + 1).abs())


def test_compile_trains_the_plain_form():
    args = plain_arguments("gelu", torch.float32)

    def loss(x, w, b, r):
        return compact_linear(x, w, b, *args[3:7], r).square().sum()

    leaves = (*args[:3], args[7])
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@native
@pytest.mark.parametrize("which", ["x", "bias", "residual", "packed"])
def test_packed_form_has_no_gradient_and_says_so(which):
    tensors = {"x": torch.randn(3, 12), "packed": pack_weight(torch.randn(40, 12)), "bias": torch.randn(40),
               "residual": torch.randn(3, 40)}  # fmt: skip
    run = lambda: compact_linear(  # noqa: E731
        tensors["x"], tensors["packed"], tensors["bias"], None, None, 40, "none", tensors["residual"]
    )
    assert not run().requires_grad
    tensors[which].requires_grad_()
    y = run()
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="packed weight is for inference"):
        y.sum().backward()
    with torch.no_grad():
        assert not run().requires_grad


@native
def test_dispatch_modes_and_transforms_see_the_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    packed, x = pack_weight(torch.randn(40, 12)), torch.randn(3, 12)
    expected = compact_linear(x, packed, None, None, None, 40)
    with Log():
        y = compact_linear(x, packed, None, None, None, 40)
    assert seen == ["prunekern.compact_linear.default"]
    assert torch.equal(y, expected)
    with torch.device("meta"):  # a default device is no reason to write y somewhere else
        assert torch.equal(compact_linear(x, packed, None, None, None, 40), expected)


@native
def test_the_short_way_is_taken():
    """An ordinary call never reaches the checked path (20 times slower); what only looks ordinary does."""
    module = sys.modules[compact_linear.__module__]
    if module._EAGER is None:
        pytest.skip("torch < 2.10 has no DLPack exchange ABI: every call is checked in Python")
    packed, x, bias, index = pack_weight(torch.randn(40, 12)), torch.randn(2, 3, 12), torch.randn(40), kept(40, 90)
    ordinary = (packed, bias, None, index, 90, 2, torch.randn(2, 3, 90), 1, None, 0)
    for taken in (x, torch.randn(5, 12), torch.randn(12)[None], torch.randn(2, 3, 20)[..., 4:16], x[:, :1]):
        rest = (*ordinary[:6], torch.randn(*taken.shape[:-1], 90), 1, None, 0)
        assert module._EAGER(taken, *rest) is not None
    for left in (x.double(), x.to("meta"), x.mT.contiguous().mT, torch._neg_view(x), x[:0], x[..., :11], None, 3):
        assert module._EAGER(left, *ordinary) is None


@native
def test_negative_bit():
    """torch keeps the sign of x.conj().imag aside: whoever reads its memory must not take it for its value."""
    x, weight, bias = torch.randn(3, 12), torch.randn(40, 12), torch.randn(40)
    packed = pack_weight(weight)
    y, bound = naive(-x, weight, -bias, None, None, 40, "none", -torch.ones(3, 40))
    minus = torch._neg_view
    assert_close(
        compact_linear(minus(x), packed, minus(bias), None, None, 40, "none", minus(torch.ones(3, 40))), y, bound
    )
    assert torch.equal(unpack_weight(pack_weight(minus(weight)), 40), -weight)


@native
def test_an_ordinary_call_notices_new_arguments():
    """Nothing is remembered from one call to the next."""
    weight, bias, out_index, x = torch.randn(40, 12), torch.randn(40), kept(40, 90), torch.randn(3, 12)
    packed = pack_weight(weight)
    compact_linear(x, packed, bias, None, out_index, 90)
    other = torch.randn(40)
    bias.data = other
    assert_close(
        compact_linear(x, packed, bias, None, out_index, 90),
        *naive(x, weight, other, None, out_index, 90, "none", None),
    )
    out_index[5] = out_index[4]  # checked by value on every call
    with pytest.raises(ValueError, match=r"out_index must be sorted and < 90 \(got \d+ at position 5\)"):
        compact_linear(x, packed, bias, None, out_index, 90)
    bias.data = torch.randn(41)
    with pytest.raises(ValueError, match="bias"):
        compact_linear(x, packed, bias, None, kept(40, 90), 90)
    with pytest.raises(ValueError, match="x must have 12 channels"):
        compact_linear(torch.randn(3, 13), packed, None, None, None, 40)
