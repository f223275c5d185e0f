"""Training a compact layer in bf16: products of 16 bits where this CPU has them, gradients to their rounding."""

import pytest
import torch

from prunekern.nn import CompactLinear
from prunekern.ops.compact_linear import compact_linear, compact_linear_reference
from prunekern.ops.narrow import multiplies_bf16

EPS = 2.0**-8  # of one rounding to bf16
NAMES = ("x", "weight", "bias", "residual")


def subject(activation, gathers, dtype):
    """x, weight, bias and residual as leaves, and the other arguments."""
    torch.manual_seed(0)
    kept_in, kept_out, n_in, n_out = (24, 17, 40, 31) if gathers else (40, 17, 40, 17)
    shapes = (5, 7, n_in), (kept_out, kept_in), (kept_out,), (5, 7, n_out)
    leaves = [torch.randn(shape).div_(2).to(dtype).requires_grad_() for shape in shapes]
    index = [torch.randperm(n)[:k].sort().values if gathers else None for n, k in ((n_in, kept_in), (n_out, kept_out))]
    return leaves, (*index, n_out, activation)


def run(function, leaves, rest):
    """y and the gradients of its sum with fixed random weights, as float64."""
    x, weight, bias, residual = leaves
    y = function(x, weight, bias, *rest, residual)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((y.double() * weights).sum(), leaves)
    return [t.detach().double() for t in (y, *grads)]


def in_float64(leaves, rest):
    return run(compact_linear_reference, [t.detach().double().requires_grad_() for t in leaves], rest)


@pytest.mark.parametrize("gathers", (False, True))
@pytest.mark.parametrize("activation", ("none", "relu", "gelu", "gelu_tanh", "silu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_are_those_of_fp32_to_the_rounding_of_bf16(activation, gathers, dtype):
    leaves, rest = subject(activation, gathers, dtype)
    exact = in_float64(leaves, rest)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(compact_linear, leaves, rest)
    for name, one, right in zip(("y", *NAMES), got, exact, strict=True):
        # Roundings of both factors, of z on the way to the activation and of the result: 4, each of at most EPS / 2,
        # relative to sums whose terms may cancel. Random signs leave about a tenth of the size of the terms; of relu,
        # whose derivative jumps where z is rounded past zero, one more element may change altogether.
        size = right.abs().max()
        wrong = (one - right).abs() > 4 * EPS * size
        assert wrong.double().mean() <= (0.02 if activation == "relu" else 0), name
        assert one.shape == right.shape


def test_what_is_multiplied():
    """Under autocast the products are bf16's where `multiplies_bf16`, and float32's to the bit where not."""
    leaves, rest = subject("none", False, torch.float32)
    x, weight, bias, residual = (t.detach() for t in leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y = compact_linear(x, weight, bias, *rest, residual)
    wide = compact_linear_reference(x, weight, bias, *rest, residual)
    assert y.dtype == torch.float32
    if multiplies_bf16():
        exact = compact_linear_reference(x.bfloat16().double(), weight.bfloat16().double(), bias, *rest, residual)
        assert not torch.equal(y, wide)
        assert ((y - exact).abs() <= EPS * (exact - bias - residual).abs() + 1e-6).all()  # one rounding of the sum
    else:
        assert torch.equal(y, wide)


def test_float64_stays_float64():
    leaves, rest = subject("gelu", True, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for got, right in zip(run(compact_linear, leaves, rest), in_float64(leaves, rest), strict=True):
            torch.testing.assert_close(got, right)


def test_a_layer_in_training_under_autocast():
    torch.manual_seed(0)
    layer = CompactLinear(torch.randn(17, 40), torch.randn(17)).requires_grad_()
    x = torch.randn(6, 40)
    layer(x).square().mean().backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).square().mean()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert (layer.weight.grad - want).abs().max() <= 4 * EPS * want.abs().max()
    assert torch.equal(layer.weight.grad, want) != multiplies_bf16()


def test_second_derivatives():
    leaves, rest = subject("gelu", False, torch.float32)
    x, weight, bias, residual = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = compact_linear(x, weight, bias, *rest, residual)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = compact_linear_reference(exact_x, exact_weight, bias.double(), *rest, residual.double())
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), exact_x, create_graph=True)
    (exact_second,) = torch.autograd.grad(exact_grad.square().sum(), exact_weight)
    assert (second - exact_second).abs().max() <= 16 * EPS * exact_second.abs().max()  # four products deep
