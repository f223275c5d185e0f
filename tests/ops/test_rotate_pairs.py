"""rotate_pairs: numbers against float64, gradients, tracing, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from prunekern.ops import rotate_pairs
from prunekern.ops.rotate_pairs import rotate_pairs_reference

EPS = 2.0**-24
FIRST = (0, 4, 4, 6, 26)
ANGLES = 17


def inputs(batch, tokens, shared_by=1, tables=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, tokens, shared_by * FIRST[-1], generator=g, dtype=dtype)
    cos, sin = (torch.randn(tables or batch, tokens, ANGLES, generator=g, dtype=dtype) for _ in range(2))
    angle = torch.randint(0, ANGLES, (FIRST[-1] // 2,), generator=g)
    return x, cos, sin, angle


def naive(x, cos, sin, angle, first, shared_by=1) -> tuple[Tensor, Tensor]:
    """Pair by pair in float64: (y, bound on the error of an fp32 result)."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    y, bound = torch.zeros_like(x), torch.zeros_like(x)
    for begin, end in zip(first, first[1:], strict=False):
        half = (end - begin) // 2
        for i in range(shared_by):
            for j in range(half):
                a = shared_by * begin + 2 * i * half + j
                b, at = a + half, angle[begin // 2 + j]
                c, s = cos[..., at], sin[..., at]
                y[..., a], y[..., b] = x[..., a] * c - x[..., b] * s, x[..., b] * c + x[..., a] * s
                sizes = (x[..., a] * c).abs() + (x[..., b] * s).abs() + (x[..., b] * c).abs() + (x[..., a] * s).abs()
                bound[..., a] = bound[..., b] = 2 * EPS * sizes
    return y, bound


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("shared_by", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_against_float64(tokens, shared_by, tables):
    args = (*inputs(3, tokens, shared_by, tables), FIRST, shared_by)
    y, bound = naive(*args)
    x = args[0]
    strided = torch.cat([x, x], -1)[..., : x.shape[-1]]
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for one in (x, strided, turned):
        for op in (rotate_pairs, rotate_pairs_reference):
            got = op(one, *args[1:])
            assert got.shape == x.shape and bool(((got.double() - y).abs() <= bound).all())
    checked = rotate_pairs(x, *args[1:4], list(FIRST), shared_by)  # not the short way
    assert bool(((checked.double() - y).abs() <= bound).all())
    exact = rotate_pairs(*(t.double() for t in args[:3]), *args[3:])
    torch.testing.assert_close(exact, y, rtol=1e-13, atol=1e-13)


def test_it_is_transformers_rotation():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 6, 5, 8, generator=g), torch.randn(2, 2, 5, 8, generator=g)
    freqs = torch.randn(1, 5, 4, generator=g)
    cos, sin = (f(torch.cat([freqs, freqs], -1)) for f in (torch.cos, torch.sin))
    want = apply_rotary_pos_emb(q, k, cos, sin)
    angle, first = torch.arange(4).repeat(2), (0, 8, 16)
    for x, y, shared_by in ((q, want[0], 3), (k, want[1], 1)):
        got = rotate_pairs(x.transpose(1, 2).flatten(2), cos, sin, angle, first, shared_by)
        torch.testing.assert_close(got, y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_fp32(dtype):
    x, cos, sin, angle = inputs(2, 5)
    x = x.to(dtype)
    y = rotate_pairs(x, cos, sin, angle, FIRST)
    assert y.dtype == dtype and torch.equal(y, rotate_pairs(x.float(), cos, sin, angle, FIRST).to(dtype))


def test_nothing_there():
    for shape, first in (((0, 5, 26), FIRST), ((2, 0, 26), FIRST), ((2, 5, 0), (0,)), ((2, 5, 0), (0, 0, 0))):
        table = torch.zeros(max(shape[0], 1), shape[1], ANGLES)
        angle = torch.zeros(first[-1] // 2, dtype=torch.int64)
        assert rotate_pairs(torch.zeros(shape), table, table, angle, first).shape == shape


def test_gradcheck():
    x, cos, sin, angle = inputs(2, 3, 2, 1, torch.float64)
    torch.autograd.gradcheck(lambda x: rotate_pairs(x, cos, sin, angle, FIRST, 2), [x.requires_grad_()])


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    x, cos, sin, angle = inputs(2, 3, 2)
    args = (x.requires_grad_(grad), cos, sin, angle, list(FIRST), 2)
    torch.library.opcheck(torch.ops.prunekern.rotate_pairs.default, args)


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(grad):
    x, *rest = inputs(2, 3, 2)
    x.requires_grad_(grad)

    def f(x, *rest):
        return rotate_pairs(x * 2, *rest, FIRST, 2) + 1

    torch.compiler.reset()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(x, *rest)
    torch.testing.assert_close(got, f(x, *rest))
    if grad:
        ours, want = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, f(x, *rest)))
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"x": torch.zeros(5, 26)}, ValueError, "x must have shape [*, *, *] (got [5, 26])"),
        ({"x": torch.zeros(2, 3, 26, dtype=torch.int64)}, TypeError, "x must be float64, float32"),
        ({"cos": torch.zeros(2, 4, ANGLES)}, ValueError, "cos must have shape [*, 3, 17] (got [2, 4, 17])"),
        ({"sin": torch.zeros(2, 3, 9)}, ValueError, "sin must have shape [*, 3, 17] (got [2, 3, 9])"),
        ({"sin": torch.zeros(3, 3, ANGLES)}, ValueError, "sin must have 1 or 2 sequences like x (got 3)"),
        ({"cos": torch.zeros(2, 3, ANGLES, device="meta")}, ValueError, "cos is on meta, x on cpu"),
        ({"shared_by": 0}, ValueError, "shared_by must divide the 26 channels of x (got 0)"),
        ({"shared_by": 4}, ValueError, "shared_by must divide the 26 channels of x (got 4)"),
        ({"first": (0, 3, 26)}, ValueError, "first must ascend in even steps (got 3 at position 1)"),
        ({"first": (0, 24)}, ValueError, "first must ascend from 0 to 26"),
        ({"first": ()}, ValueError, "first must ascend from 0 to 26"),
        ({"angle": torch.zeros(13)}, TypeError, "angle must be int64 (got torch.float32)"),
        ({"angle": torch.zeros(12, dtype=torch.int64)}, ValueError, "angle must have shape [13] (got [12])"),
        ({"angle": torch.full((13,), ANGLES)}, ValueError, "angle must be in 0..16 (got 17"),
        ({"angle": torch.full((13,), -1)}, ValueError, "angle must be in 0..16 (got -1"),
    ],
)
def test_refusals(change, error, text):
    x, cos, sin, angle = inputs(2, 3)
    args = {"x": x, "cos": cos, "sin": sin, "angle": angle, "first": FIRST} | change
    with pytest.raises(error, match=re.escape(f"rotate_pairs: {text}")):
        rotate_pairs(**args)
