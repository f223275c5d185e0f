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
    with torch.autocast("cpu", enabled=False):  # as training loops do; inside it PyTorch's own products would be bf16's
        grads = torch.autograd.grad((y.double() * weights).sum(), leaves)
    return [t.detach().double() for t in (y, *grads)]


def in_float64(leaves, rest):
    return run(compact_linear_reference, [t.detach().double().requires_grad_() for t in leaves], rest)


# Largest |slope| and |curvature| of the activations; relu's slope jumps at 0.
SLOPE = {"none": 1.0, "relu": 1.0, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1, "quick_gelu": 1.1}
CURVATURE = {"none": 0.0, "relu": 0.0, "gelu": 0.8, "gelu_tanh": 0.8, "silu": 0.5, "quick_gelu": 0.86}


def bounds(leaves, rest):
    """How far y and the gradients may be off, element by element, in float64.

    Each rounding to bf16 is one of EPS: of x, of the weight, of z; then of d, the gradient of z, and of both
    products of d. What is left in fp32 is below a tenth of one. A gradient of bf16 leaves is rounded once more.
    """
    x, weight, bias, residual = (t.detach().double() for t in leaves)
    in_index, out_index, n_out, activation = rest
    read = (x if in_index is None else x[..., in_index]).flatten(0, -2)
    slope = SLOPE[activation]
    z = read @ weight.T
    off_z = 2.1 * EPS * (read.abs() @ weight.abs().T) + 1.1 * EPS * z.abs()
    z = z + bias
    g = torch.randn((*x.shape[:-1], n_out), generator=torch.Generator().manual_seed(1)).double()
    own = g.flatten(0, -2) if out_index is None else g.flatten(0, -2)[:, out_index]
    jumps = (z.abs() <= off_z) if activation == "relu" else torch.zeros_like(z)
    off_d = own.abs() * (CURVATURE[activation] * off_z + jumps)
    if leaves[0].dtype is torch.bfloat16:
        off_d = off_d + EPS * own.abs() * slope  # y's gradient arrives in bf16
    d = slope * own.abs() + off_d
    low = off_d + 1.1 * EPS * d  # d as it is multiplied
    product = 2.2 * EPS  # the other factor rounded, and the sum
    off_x = low @ weight.abs() + product * (d @ weight.abs())
    off_weight = low.T @ read.abs() + product * (d.T @ read.abs())
    off_bias = off_d.sum(0) + 0.1 * EPS * d.sum(0)
    off_y = slope * off_z
    if in_index is not None:
        off_x = torch.zeros(len(off_x), x.shape[-1], dtype=off_x.dtype).index_copy(1, in_index, off_x)
    if out_index is not None:
        off_y = torch.zeros(len(off_y), n_out, dtype=off_y.dtype).index_copy(1, out_index, off_y)
    return [off_y.view_as(g), off_x.view_as(x), off_weight, off_bias, torch.zeros_like(residual)]


@pytest.mark.parametrize("gathers", (False, True))
@pytest.mark.parametrize("activation", tuple(SLOPE))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("function", (compact_linear, torch.ops.prunekern.compact_linear), ids=("eager", "op"))
def test_gradients_are_those_of_fp32_to_the_rounding_of_bf16(activation, gathers, dtype, function):
    leaves, rest = subject(activation, gathers, dtype)
    exact = in_float64(leaves, rest)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(function, leaves, rest)
    if dtype is torch.float32:  # what was multiplied, forward and backward
        wide = run(function, leaves, rest)
        for one, other in zip(got[:3], wide[:3], strict=True):
            assert torch.equal(one, other) != multiplies_bf16()
    last = EPS if dtype is torch.bfloat16 else 2.0**-20  # what comes out, in the dtype of the leaf
    for name, one, right, off in zip(("y", *NAMES), got, exact, bounds(leaves, rest), strict=True):
        assert ((one - right).abs() <= off + last * (right.abs() + off)).all(), name


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
    y = torch.nn.functional.linear(x, layer.weight, layer.bias).detach()
    d = 2 / y.numel() * y.abs()  # of the mean square
    off = 2.1 * EPS * (x.abs() @ layer.weight.abs().T) + 1.1 * EPS * (y - layer.bias).abs()  # of y
    low = 2 / y.numel() * off + 1.1 * EPS * (d + 2 / y.numel() * off)
    bound = low.T @ x.abs() + 2.2 * EPS * (d + low).T @ x.abs()  # as in `bounds`
    assert ((layer.weight.grad - want).abs() <= bound).all()
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
