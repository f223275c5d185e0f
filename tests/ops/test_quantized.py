"""int8 arithmetic: x rounded by row, in every op and layer, against the reference; odd rows; what is refused."""

from __future__ import annotations

import pytest
import torch

from prunekern import _native
from prunekern.nn import CompactLinear, CompactMLP
from prunekern.ops import compact_linear, compact_mlp, pack_weight, quantize_rows, quantize_weight
from prunekern.ops.compact_linear import ACTIVATIONS, compact_linear_reference
from prunekern.ops.compact_mlp import compact_mlp_reference
from tests.helpers.compact_linears import kept, native

GELU = 6e-5  # how far gelu is off beside sums in int32: a short polynomial, as they are coarse


def linear_in_8_bits(x, weight, bias, scale, activation):
    return compact_linear_reference(x, weight, bias, activation=activation, scale=scale, activations="int8")


def sqnr(got, want):
    """Signal over noise, in decibels."""
    want = want.double()
    return float(10 * (want.square().sum() / (got.double() - want).square().sum()).log10())


def is_float(y, x, w):
    """Whether y is x w^T in fp32: within a rounding for each of K products, one for the sum and two for a scale."""
    x, w = x.double(), w.double()
    bound = (x.shape[1] + 3) * 2.0**-24 * (x.abs() @ w.abs().t())
    return bool(((y.double() - x @ w.t()).abs() <= bound).all())


def is_near(got, want, hidden, off_hidden, down, scale, out=None, residual=0.0):
    """Whether rows of an MLP in 8 bits are those of the reference but for what was a hair from the middle of two steps.

    Both round a row of `hidden` [m, H], which they know to `off_hidden`, to steps of its largest value / 127. A value
    that goes to the other side takes y [m, N] with it by a step times its weight. On 2 off_hidden of a step it may:
    so of two values of a row at most, and of half of the rows. The others have the same integers; their scales are as
    far apart as their largest values, and eight roundings make y of the sum (scales of x and W, bias, residual; twice).
    """
    largest = hidden.abs().amax(1, keepdim=True).double()  # [m, 1]
    turned = 2 * largest / 127 * (down.abs().amax(1) * scale).double()  # [m, N]
    if out is not None:
        turned = turned.new_zeros(want.shape).index_copy(1, out, turned)
    size = (want.double() - residual).abs().amax(1, keepdim=True) + torch.as_tensor(residual).abs().max()
    rounded = (off_hidden / largest + 8 * 2.0**-24) * size
    off = (got.double() - want).abs()
    return bool((off <= turned + rounded).all()) and int((off > rounded).any(1).sum()) <= len(got) / 2


def parts(m=33, n=70, k=53, gather=True, scatter=True, dtype=torch.float32):
    torch.manual_seed(m + n + k)
    x, (weight, scale) = torch.randn(m, k + 7 * gather).to(dtype), quantize_weight(torch.randn(n, k))
    in_index, out_index = kept(k, k + 7) if gather else None, kept(n, n + 9) if scatter else None
    n_out = n + 9 * scatter
    return x, weight, scale, torch.randn(n), in_index, out_index, n_out, torch.randn(m, n_out).to(dtype)


def test_rows_are_rounded_to_nearest_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1e-40, 0.0, 0.0, 0.0]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, -2], [0] * 4, [0] * 4] and scale.flatten().tolist() == [1.0, 0.0, 0.0]
    q, scale = quantize_rows(torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [2.0, -1.0]]))
    assert scale.isnan().flatten().tolist() == [True, True, False] and not q[:2].any()
    q, scale = quantize_rows(torch.randn(5, 300).bfloat16())
    assert q.abs().amax(1).tolist() == [127] * 5
    assert quantize_rows(torch.zeros(2, 0))[1].tolist() == [[0.0], [0.0]]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_against_the_reference(activation, dtype):
    """The same integers, so that only the roundings of the last few operations differ."""
    for m, k in ((1, 53), (5, 16), (14, 372), (129, 53)):
        for gather, scatter in ((False, False), (True, True)):
            x, weight, scale, bias, into, out, n_out, residual = parts(m, 70, k, gather, scatter, dtype)
            args = (bias, into, out, n_out, activation, residual, scale, "int8")
            want = compact_linear_reference(x, weight, *args)
            step = 2**-7 if dtype == torch.bfloat16 else 1e-6  # one step of y, where the sums round to either side
            for _ in range(2):  # the second call takes the short way
                got = compact_linear(x, pack_weight(weight), *args)
                coarse = GELU if activation == "gelu" else 0.0
                torch.testing.assert_close(got, want, rtol=step, atol=step * float(want.abs().max()) + coarse)
            torch.testing.assert_close(compact_linear(x, weight, *args), want, rtol=0, atol=0)


@native
def test_what_each_word_does():
    x, weight, scale, *_ = parts(200, 96, 512, False, False)
    packed, exact = pack_weight(weight), x.double() @ (weight.double() * scale.double()[:, None]).t()
    rounded, floating = (
        compact_linear(x, packed, None, None, None, 96, "none", None, scale, word) for word in ("int8", "float")
    )
    auto = compact_linear(x, packed, None, None, None, 96, "none", None, scale)
    assert torch.equal(auto, rounded) or torch.equal(auto, floating)
    assert torch.equal(auto, rounded) == (_native.core().run_peak(1, "int8") > 0)  # this set has 8-bit products
    # A step is the largest of 512 normal values (3.2 in the quadratic mean) / 127, the error uniform in it: 42.7 dB.
    # 200 rows give it to 2 % or 0.1 dB: 0.8 is far beyond chance, and half of what a step 20 % off would make.
    assert 41.9 < sqnr(rounded, exact) < 43.5
    assert is_float(floating, x, weight * scale[:, None])


@native
def test_float_leaves_x_alone_beside_bf16_weights_too():
    """Where bf16 is multiplied by bf16, x is rounded to it, unless it is to be left as it is."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 300), torch.randn(64, 300).bfloat16()
    exact, packed = x.double() @ weight.double().t(), pack_weight(weight)
    # A step of bf16 is 2^-7 of the power of two below a value, which is 1/2 to 1 of it; errors are uniform in it: 52.9
    # to 59.0 dB, and what 2,560 sums leave to chance, 2.8 % or 0.1 dB, five times.
    least, most = 52.3, 59.6
    y = compact_linear(x, packed, None, None, None, 64, "none", None, None, "float")
    auto = compact_linear(x, packed, None, None, None, 64)
    assert is_float(y, x, weight)
    assert is_float(auto, x, weight) or least < sqnr(auto, exact) < most
    if _native._C.bf16_verdict()[0] and _native.core().isa() == "avx512_bf16":
        assert not is_float(auto, x, weight)


@native
def test_mlp_against_the_reference():
    for m in (1, 5, 60):
        for gated in (False, True):
            torch.manual_seed(m)
            (up, up_scale), (gate, gate_scale) = (quantize_weight(torch.randn(70, 37)) for _ in range(2))
            down, down_scale = quantize_weight(torch.randn(33, 70))
            x, out, residual = torch.randn(m, 37), kept(33, 40), torch.randn(m, 40)
            biases = (torch.randn(70), torch.randn(33), torch.randn(70) if gated else None)
            rest = (*biases, up_scale, down_scale, gate_scale if gated else None, None, out, 70, 40, "gelu", residual)
            want = compact_mlp_reference(x, up, down, gate if gated else None, *rest, "int8")
            packed = [pack_weight(w) for w in (up, down, gate)]
            got = compact_mlp(x, packed[0], packed[1], packed[2] if gated else None, *rest, "int8")
            first = (gate, biases[2], gate_scale) if gated else (up, biases[0], up_scale)
            hidden, off = linear_in_8_bits(x, *first, "gelu"), GELU
            if gated:
                linear = linear_in_8_bits(x, up, biases[0], up_scale, "none")
                hidden, off = hidden * linear, GELU * float(linear.abs().max())
            assert is_near(got, want, hidden, off, down, down_scale, out, residual), (m, gated)


@native
def test_rows_that_cannot_be_rounded():
    """NaN and infinities reach the whole row of y; zeros and what underflows give the bias."""
    x, weight, scale, bias, *_ = parts(6, 40, 37, False, False)
    x[0, 3], x[1, 36], x[2, 0] = float("nan"), float("inf"), -float("inf")
    x[3] = 0.0
    x[4] = 1e-42
    for w in (pack_weight(weight), weight):
        y = compact_linear(x, w, bias, None, None, 40, "none", None, scale, "int8")
        assert y[:3].isnan().all() and torch.equal(y[3], bias) and torch.equal(y[4], bias) and y[5].isfinite().all()
        z = compact_linear(x, w, bias, None, None, 40, "gelu", torch.zeros(6, 40), scale, "int8")
        assert z[:3].isnan().all() and z[3:].isfinite().all()


def test_refusals():
    x, weight, scale, *_ = parts(3, 8, 6, False, False)
    plain = torch.randn(8, 6)
    with pytest.raises(ValueError, match="activations must be one of auto, float, int8 \\(got 'int4'\\)"):
        compact_linear(x, weight, None, None, None, 8, "none", None, scale, "int4")
    with pytest.raises(ValueError, match="must be auto or float with a torch.float32 weight .*: hold packed in int8"):
        compact_linear(x, plain, activations="int8")
    with pytest.raises(ValueError, match="must be auto or float where a gradient is needed .*torch.no_grad"):
        compact_linear(x.clone().requires_grad_(), weight, None, None, None, 8, "none", None, scale, "int8")
    with pytest.raises(ValueError, match="compact_mlp: activations must be auto or float with a torch.float32 weight"):
        compact_mlp(x, plain, plain.t().contiguous(), activations="int8")
    with pytest.raises(ValueError, match="CompactLinear: activations must be auto or float with fp32 weights"):
        CompactLinear(plain, activations="int8")
    with pytest.raises(ValueError, match="CompactLinear: activations must be one of auto, float, int8"):
        CompactLinear(plain, activations="fast")
    layer = CompactLinear(plain, weights="int8", activations="int8")
    with pytest.raises(ValueError, match="where a gradient is needed"):
        layer(x.clone().requires_grad_())
    layer.activations = "both"
    with pytest.raises(ValueError, match="activations must be one of"):
        layer(x)


@native
def test_too_many_inputs():
    """Sums of more than 133,143 products of 127 and 127 may not fit int32: said, and not done by itself."""
    k = 133_144
    x, (weight, scale) = torch.ones(1, k), quantize_weight(torch.ones(8, k))
    packed = pack_weight(weight)
    with pytest.raises(ValueError, match="at most 133143 inputs"):
        compact_linear(x, packed, None, None, None, 8, "none", None, scale, "int8")
    auto = compact_linear(x, packed, None, None, None, 8, "none", None, scale)
    assert torch.equal(auto, compact_linear(x, packed, None, None, None, 8, "none", None, scale, "float"))
    most = compact_linear(x[:, 1:].contiguous(), pack_weight(weight[:, 1:].contiguous()), None, None, None, 8, "none",
                          None, scale, "int8")  # fmt: skip
    torch.testing.assert_close(most, torch.full((1, 8), k - 1.0), rtol=1e-6, atol=0)


@native
def test_layers_follow_their_attribute():
    torch.manual_seed(0)
    x, layer = torch.randn(20, 48), CompactLinear(torch.randn(40, 48), torch.randn(40), weights="int8")
    answers = {}
    for word in ("auto", "int8", "float"):
        layer.activations = word
        answers[word] = layer(x)
        want = compact_linear_reference(x, layer.weight, layer.bias, n_out=40, scale=layer.scale, activations=word)
        if word != "auto":
            torch.testing.assert_close(answers[word], want, rtol=1e-5, atol=1e-4)
    assert not torch.equal(answers["int8"], answers["float"])
    assert layer.set_weights("fp32").activations == "float" and "activations=float" in repr(layer)
    layer.set_weights("int8", "int8").set_weights("bf16")
    assert layer.activations == "auto"  # bf16 weights take no int8
    assert list(layer.state_dict()) == ["weight", "bias"]
    up, down = (CompactLinear(torch.randn(n, k), weights="int8") for n, k in ((64, 48), (30, 64)))
    mlp = CompactMLP(up, down, activations="int8")
    assert up.activations == down.activations == "int8"
    rounded = mlp(x)
    want = compact_mlp_reference(x, up.weight, down.weight, None, None, None, None, up.scale, down.scale, None, None,
                                 None, 64, 30, "gelu", None, "int8")  # fmt: skip
    hidden = linear_in_8_bits(x, up.weight, None, up.scale, "gelu")
    assert is_near(rounded, want, hidden, GELU, down.weight, down.scale)
    up.activations = "float"  # one of two: each layer as it says
    hidden = compact_linear_reference(x, up.weight, scale=up.scale, activation="gelu")
    want = compact_linear_reference(hidden, down.weight, scale=down.scale, activations="int8")
    # Sums of 48 products in fp32, a gelu no steeper than 1.2 and good to 1e-6 (CONTRIBUTING).
    size = (x.abs() @ (up.weight.abs() * up.scale[:, None]).t()).max()
    off = 1.2 * 49 * 2.0**-24 * float(size) + 1e-6 * float(hidden.abs().max())
    assert is_near(mlp(x), want, hidden, off, down.weight, down.scale)


@native
def test_opcheck_and_compile():
    x, weight, scale, bias, into, out, n_out, residual = parts()
    for w in (weight, pack_weight(weight)):
        args = (x, w, bias, into, out, n_out, "gelu", residual, scale, "int8")
        torch.library.opcheck(torch.ops.prunekern.compact_linear, args)
        compiled = torch.compile(lambda *a: compact_linear(*a) + 1, fullgraph=True)
        torch.testing.assert_close(compiled(*args), compact_linear(*args) + 1, rtol=1e-5, atol=1e-5)
    layer = CompactLinear(torch.randn(40, 48), weights="int8", activations="int8").pack()
    y = torch.compile(layer, fullgraph=True)(x[:, :48])
    torch.testing.assert_close(y, layer(x[:, :48]), rtol=0, atol=0)
    layer.activations = "float"
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x[:, :48]), layer(x[:, :48]), rtol=0, atol=0)
