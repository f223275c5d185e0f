"""int4 weights: how they are rounded and packed; every op on them, plain and packed, against what the codes stand for
and, with x rounded too, against the reference; what is refused.
"""

from __future__ import annotations

import re

import pytest
import torch

from prunekern import _native
from prunekern.ops import (
    compact_linear,
    compact_mlp,
    dequantize_weight_int4,
    pack_weight,
    quantize_weight_int4,
    unpack_weight,
)
from prunekern.ops.compact_linear import ACTIVATIONS, compact_linear_reference
from prunekern.ops.compact_mlp import compact_mlp_reference
from tests.helpers.compact_linears import assert_close, kept, naive, native

SIZES = ((1, 1), (7, 31), (33, 32), (40, 33), (70, 372))


def sqnr(got, want):
    """Signal over noise, in decibels."""
    want = want.double()
    return float(10 * (want.square().sum() / (got.double() - want).square().sum()).log10())


def parts(m=33, n=70, k=53, gather=True, scatter=True, dtype=torch.float32):
    torch.manual_seed(m + n + k)
    x, (codes, scale) = torch.randn(m, k + 7 * gather).to(dtype), quantize_weight_int4(torch.randn(n, k))
    in_index, out_index = kept(k, k + 7) if gather else None, kept(n, n + 9) if scatter else None
    n_out = n + 9 * scatter
    return x, codes, scale, torch.randn(n), in_index, out_index, n_out, torch.randn(m, n_out).to(dtype)


# --- rounding and packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", SIZES)
def test_codes_written_out(n, k):
    torch.manual_seed(0)
    weight = torch.randn(n, k)
    codes, scale = quantize_weight_int4(weight)
    groups = -(-k // 32)
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (n, 16 * groups))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float16, (n, groups))
    got = dequantize_weight_int4(codes, scale, k)
    for i in range(n):
        for j in range(32 * groups):
            byte = int(codes[i, j // 32 * 16 + j % 16])
            q = (byte % 16 if j % 32 < 16 else byte // 16) - 8
            if j < k:
                assert float(got[i, j]) == q * float(scale[i, j // 32])
            else:
                assert q == 0
    # A plain rounding with the largest / 7 is never much nearer.
    padded = torch.zeros(n, 32 * groups)
    padded[:, :k] = weight
    step = (padded.view(n, groups, 32).abs().amax(2, keepdim=True) / 7).half().float()
    plain = ((padded.view(n, groups, 32) / step).round() * step).view(n, -1)[:, :k]
    assert sqnr(got, weight) > sqnr(plain, weight) - 0.1


def test_signal_over_noise():
    torch.manual_seed(0)
    weight = torch.randn(500, 640)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        rounded = dequantize_weight_int4(*quantize_weight_int4(weight.to(dtype)), 640)
        assert 21.7 < sqnr(rounded, weight.to(dtype)) < 21.9
    # A size that fp16 scales hold with fewer bits costs little, one they do not hold is zero.
    assert sqnr(dequantize_weight_int4(*quantize_weight_int4(weight * 1e-5), 640), weight * 1e-5) > 21.6
    assert not dequantize_weight_int4(*quantize_weight_int4(weight * 1e-9), 640).any()
    large = weight * 7e4
    assert sqnr(dequantize_weight_int4(*quantize_weight_int4(large), 640), large) > 21.6


@pytest.mark.parametrize("size", [1.0, 3e-3, 1e4])
def test_what_is_rounded_stays(size):
    torch.manual_seed(0)
    once = dequantize_weight_int4(*quantize_weight_int4(size * torch.randn(2000, 640)), 640)
    assert torch.equal(dequantize_weight_int4(*quantize_weight_int4(once), 640), once)


def test_groups_that_are_special():
    weight = torch.zeros(4, 64)
    weight[1, 40], weight[2, 3], weight[3] = -2.0, 5.0, 1.0
    codes, scale = quantize_weight_int4(weight)
    got = dequantize_weight_int4(codes, scale, 64)
    assert not got[0].any() and sqnr(got[1:], weight[1:]) > 60 and torch.equal(got != 0, weight != 0)
    assert scale[0].tolist() == [0, 0] and scale[1, 0] == 0
    for n, k in ((0, 5), (5, 0), (0, 0)):
        codes, scale = quantize_weight_int4(torch.zeros(n, k))
        assert dequantize_weight_int4(codes, scale, k).shape == (n, k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 5e5])
def test_what_has_no_codes(bad):
    weight = torch.zeros(3, 40)
    weight[1, 35] = bad
    with pytest.raises(ValueError, match=re.escape("must be finite and at most 393024 in size (got ")):
        quantize_weight_int4(weight)


@native
@pytest.mark.parametrize("n, k", SIZES)
def test_packing(n, k):
    torch.manual_seed(1)
    weight = torch.randn(n, k)
    codes, scale = quantize_weight_int4(weight)
    packed = pack_weight(codes, scale)
    width = _native.core().panel_width()
    assert packed.shape == (-(-n // width), -(-k // 32), 18 * width) and packed.dtype == torch.uint8
    assert packed.numel() == _native.core().packed_bytes(n, k, "int4")
    assert torch.equal(unpack_weight(packed, n, k), dequantize_weight_int4(codes, scale, k))
    # The core's own rounding: sums of errors in another order may choose another scale where two are as good.
    by_core = torch.full_like(packed, 0x5A)
    _native.core().pack_weight(weight.data_ptr(), k, 1, n, k, by_core.data_ptr(), "int4", 0)
    assert (by_core == packed).float().mean() > 0.99
    whole = dequantize_weight_int4(codes, scale, k)
    assert abs(sqnr(unpack_weight(by_core, n, k), weight) - sqnr(whole, weight)) < 0.01


# --- products ---------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rounded_rows_against_the_reference(activation, dtype):
    """The same integers, so that only the roundings of one addition for every 32 inputs, and of y, differ."""
    for m, k in ((1, 53), (5, 16), (7, 372), (129, 33)):
        for gather, scatter in ((False, False), (True, True)):
            x, codes, scale, bias, into, out, n_out, residual = parts(m, 70, k, gather, scatter, dtype)
            rest = (bias, into, out, n_out, activation, residual)
            want = compact_linear_reference(x, codes, *rest, scale, "int8")
            step = 2**-7 if dtype == torch.bfloat16 else 2e-6
            for _ in range(2):  # the second call takes the short way
                got = compact_linear(x, pack_weight(codes, scale), *rest, None, "int8")
                coarse = 6e-5 if activation == "gelu" else 0.0  # a short polynomial, as sums are coarse
                torch.testing.assert_close(got, want, rtol=step, atol=step * float(want.abs().max()) + coarse)
            plain = compact_linear(x, codes, *rest, scale, "int8")
            torch.testing.assert_close(plain, want, rtol=0, atol=0)


@native
@pytest.mark.parametrize("k", [1, 31, 33, 372])
@pytest.mark.parametrize("m", [1, 5, 30, 129])
def test_whole_rows_against_float64(m, k):
    x, codes, scale, bias, into, out, n_out, residual = parts(m, 70, k)
    rest = (bias, into, out, n_out, "gelu", residual)
    want = naive(x, dequantize_weight_int4(codes, scale, k), *rest)
    assert_close(compact_linear(x, pack_weight(codes, scale), *rest, None, "float"), *want)
    y, bound = naive(x, dequantize_weight_int4(codes, scale, k), *rest, torch_tails=True)
    assert_close(compact_linear(x, codes, *rest, scale, "float"), y, bound)
    with torch.no_grad():
        wide = compact_linear(x.double(), codes, bias.double(), into, out, n_out, "gelu", residual.double(), scale)
    torch.testing.assert_close(wide, y, rtol=1e-12, atol=1e-12)


@native
def test_what_each_word_does():
    x, codes, scale, *_ = parts(200, 96, 512, False, False)
    torch.manual_seed(200 + 96 + 512)
    torch.randn(200, 512)
    weight = torch.randn(96, 512).double()
    packed, exact = pack_weight(codes, scale), x.double() @ weight.t()
    rounded, floating, auto = (
        compact_linear(x, packed, None, None, None, 96, "none", None, None, word) for word in ("int8", "float", "auto")
    )
    assert torch.equal(auto, floating if _native.core().isa() == "generic" else rounded)
    assert 21.4 < sqnr(rounded, exact) < sqnr(floating, exact) < 22.2
    stored = x.double() @ dequantize_weight_int4(codes, scale, 512).double().t()
    assert 41.9 < sqnr(rounded, stored) < 43.5 and sqnr(floating, stored) > 100


@native
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 5, 60])
def test_mlp(m, gated):
    torch.manual_seed(m)
    up, gate, down = (quantize_weight_int4(torch.randn(n, k)) for n, k in ((70, 37), (70, 37), (33, 70)))
    x, out, residual = torch.randn(m, 37), kept(33, 40), torch.randn(m, 40)
    biases = (torch.randn(70), torch.randn(33), torch.randn(70) if gated else None)
    scales = (up[1], down[1], gate[1] if gated else None)
    rest = (None, out, 70, 40, "gelu", residual)
    plain = (up[0], down[0], gate[0] if gated else None)
    packed = [pack_weight(*w) for w in (up, down, gate)]
    panels = (packed[0], packed[1], packed[2] if gated else None)
    for word, least in (("int8", 55), ("float", 110)):
        want = compact_mlp_reference(x, *plain, *biases, *scales, *rest, word)
        # Between the layers a value may round to the other side: one of 70 by one step of 127.
        assert sqnr(compact_mlp(x, *panels, *biases, None, None, None, *rest, word), want) > least
        assert sqnr(compact_mlp(x, *plain, *biases, *scales, *rest, word), want) > least


@native
def test_rows_that_cannot_be_rounded():
    """NaN and infinities reach the whole row of y; zeros and what underflows give the bias."""
    x, codes, scale, bias, *_ = parts(6, 40, 37, False, False)
    x[0, 3], x[1, 36], x[2, 0] = float("nan"), float("inf"), -float("inf")
    x[3] = 0.0
    x[4] = 1e-42
    for w, s in ((pack_weight(codes, scale), None), (codes, scale)):
        y = compact_linear(x, w, bias, None, None, 40, "none", None, s, "int8")
        assert y[:3].isnan().all() and torch.equal(y[3], bias) and torch.equal(y[4], bias) and y[5].isfinite().all()


@native
def test_more_inputs_than_int8_takes():
    """Sums are of 32 inputs at most: no number of them is too many."""
    k = 133_200
    x, (codes, scale) = torch.ones(1, k), quantize_weight_int4(torch.full((8, k), 0.5))
    y = compact_linear(x, pack_weight(codes, scale), None, None, None, 8, "none", None, None, "int8")
    torch.testing.assert_close(y, torch.full((1, 8), k / 2), rtol=1e-3, atol=0)


def test_gradients_to_x_and_bias():
    x, codes, scale, bias, into, out, n_out, residual = parts(4, 9, 37)
    x, bias, residual = (t.double().requires_grad_() for t in (x, bias, residual))
    for function in (compact_linear, torch.ops.prunekern.compact_linear):
        assert torch.autograd.gradcheck(
            lambda x, b, r, f=function: f(x, codes, b, into, out, n_out, "gelu", r, scale), (x, bias, residual)
        )


@native
def test_opcheck_and_compile():
    x, codes, scale, bias, into, out, n_out, residual = parts()
    for w, s in ((codes, scale), (pack_weight(codes, scale), None)):
        args = (x, w, bias, into, out, n_out, "gelu", residual, s, "int8")
        torch.library.opcheck(torch.ops.prunekern.compact_linear, args)
        compiled = torch.compile(lambda *a: compact_linear(*a) + 1, fullgraph=True)
        torch.testing.assert_close(compiled(*args), compact_linear(*args) + 1, rtol=1e-5, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------


@native
def test_refusals():
    x, codes, scale, *_ = parts(3, 8, 40, False, False)
    packed = pack_weight(codes, scale)

    def run(x=x, w=codes, s=scale, word="auto"):
        return compact_linear(x, w, None, None, None, 8, "none", None, s, word)

    cases = [
        (ValueError, "packed reads 33 to 64 inputs, being int4 (got 32)", lambda: run(x[:, :32])),
        (ValueError, "packed reads 33 to 64 inputs, being int4 (got 65)", lambda: run(torch.zeros(3, 65))),
        (ValueError, "packed must have shape [1, 1, ", lambda: run(x[:, :32], packed, None)),
        (ValueError, "scale is needed with an int4 weight (got None)", lambda: run(s=None)),
        (ValueError, "scale goes with an int8 weight or a plain int4 one only", lambda: run(w=packed)),
        (ValueError, "scale must have shape [8, 2] (got [8])", lambda: run(s=scale[:, 0])),
        (TypeError, "scale must be torch.float16 (got torch.float32)", lambda: run(s=scale.float())),
        (ValueError, "must be auto or float where a gradient", lambda: run(x.clone().requires_grad_(), word="int8")),
        (ValueError, "pack_weight: scale is needed with an int4 weight", lambda: pack_weight(codes)),
        (ValueError, "k is needed with int4 panels", lambda: unpack_weight(packed, 8)),
        (ValueError, "compact_mlp: up must have shape", lambda: compact_mlp(x[:, :32], codes, codes, up_scale=scale)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
