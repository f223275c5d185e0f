"""Passes over 16-bit [T, N] in blocks of rows, against float64."""

import pytest
import torch

from prunekern.ops import by_rows

torch.set_num_threads(1)

SHAPES = [(1, 1), (5, 577), (129, 33), (129, 1)]


def inputs(T, N, dtype):
    """dy, z, gain, bias; a third of the channels masked."""
    g = torch.Generator().manual_seed(T + N)
    dy, z = (torch.randn(T, N, generator=g).to(dtype) for _ in range(2))
    gain, bias = torch.rand(N, generator=g) + 0.5, torch.randn(N, generator=g)
    masked = torch.rand(N, generator=g) < 0.3
    gain[masked], bias[masked] = 0, 0
    return dy, z, gain, bias


def rounding(T, size, out=torch.float32, exact=None):
    """Of T summed in fp32, each of up to four roundings (gain, bias, dy, the square); then one cast to `out`."""
    limit = (T + 8) * 2**-24 * size
    return limit if out == torch.float32 else limit + torch.finfo(out).eps / 2 * exact.abs() + torch.finfo(out).tiny


@pytest.mark.parametrize("block", [1, 64, 2**18])  # elements: a row at a time, some, all
@pytest.mark.parametrize("T,N", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64(T, N, block, dtype, monkeypatch):
    monkeypatch.setattr(by_rows, "BLOCK", block)
    dy, z, gain, bias = inputs(T, N, dtype)
    wide = [t.double() for t in (dy, z, gain, bias)]
    for b, wide_b in ((bias, wide[3]), (None, torch.zeros(N).double())):
        y = wide[1] * wide[2] + wide_b
        got = by_rows.gained(z, gain, b, dtype)
        assert got.dtype == dtype
        size = (wide[1] * wide[2]).abs() + wide_b.abs()
        assert ((got - y).abs() <= rounding(1, size, dtype, y)).all()
        assert (got[:, gain == 0] == 0).all() or b is None
        dz, of_gain, of_bias, of_probe = by_rows.backward(dy, z, gain, b, dtype, True, True, True, True)
        exact = wide[0] * wide[2]
        assert dz.dtype == dtype and ((dz - exact).abs() <= rounding(1, exact.abs(), dtype, exact)).all()
        assert {t.dtype for t in (of_gain, of_bias, of_probe)} == {torch.float32}
        product = wide[0] * wide[1]
        assert ((of_gain - product.sum(0)).abs() <= rounding(T, product.abs().sum(0))).all()
        assert ((of_bias - wide[0].sum(0)).abs() <= rounding(T, wide[0].abs().sum(0))).all()
        # The square doubles the relative error of y, which is relative to its parts.
        limit = rounding(T, (wide[0].square() * size.square()).sum(0))
        assert ((of_probe - (wide[0] * y).square().sum(0)).abs() <= 2 * limit).all()


def test_products_in_fp32_get_dz_in_fp32():
    dy, z, gain, bias = inputs(5, 33, torch.bfloat16)
    dz = by_rows.backward(dy, z.float(), gain, bias, torch.float32, True, True, False, False)[0]
    assert dz.dtype == torch.float32 and torch.equal(dz, dy.float() * gain)


@pytest.mark.parametrize("T,N", [(0, 7), (5, 0), (0, 0)])
def test_nothing_to_pass_over(T, N):
    dy, z, gain, bias = (torch.randn(s).bfloat16() for s in ((T, N), (T, N), (N,), (N,)))
    assert by_rows.gained(z, gain, bias, torch.bfloat16).shape == (T, N)
    dz, *sums = by_rows.backward(dy, z, gain.float(), bias, torch.bfloat16, True, True, True, True)
    assert dz.shape == (T, N) and all(torch.equal(total, torch.zeros(N)) for total in sums)


def test_what_is_not_wanted_is_empty():
    dy, z, gain, bias = inputs(5, 9, torch.bfloat16)
    every = by_rows.backward(dy, z, gain, bias, torch.bfloat16, True, True, True, True)
    for i in range(4):
        wants = [j == i for j in range(4)]
        only = by_rows.backward(dy, None if i in (0, 2) else z, gain, bias, torch.bfloat16, *wants)
        assert torch.equal(only[i], every[i])
        assert all(t.numel() == 0 for j, t in enumerate(only) if j != i)


def test_strided_and_expanded_gradients():
    dy, z, gain, bias = inputs(129, 33, torch.bfloat16)
    poisoned = torch.full((129, 66), float("nan"), dtype=torch.bfloat16)
    poisoned[:, ::2] = dy
    args = z, gain, bias, torch.bfloat16, True, True, True, True
    for got, want in zip(by_rows.backward(poisoned[:, ::2], *args), by_rows.backward(dy, *args), strict=True):
        assert torch.equal(got, want)
    row = dy[:1].expand(129, 33)
    for got, want in zip(by_rows.backward(row, *args), by_rows.backward(row.contiguous(), *args), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wants", [(True, True, True, True), (True, False, False, False), (False, True, False, False)])
def test_opcheck(wants):
    dy, z, gain, bias = inputs(5, 9, torch.bfloat16)
    torch.library.opcheck(torch.ops.prunekern.dora_linear_backward.default, (dy, z, gain, bias, torch.bfloat16, *wants))
