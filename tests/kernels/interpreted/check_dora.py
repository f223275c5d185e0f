"""Triton kernels of DoRA on the CPU, in Triton's interpreter, against float64. Run by test_interpreter.py."""

import itertools

import pytest
import torch

from prunekern.kernels import dora_gain as gain_kernels
from prunekern.kernels import dora_linear as linear_kernels
from prunekern.kernels import dora_merge as merge_kernels
from tests.helpers.kernel_definitions import UNIT, dora, poisoned_empty, random, strided, within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANKS = (1, 8, 16, 33, 64, 65, 200, 512)


def case(T, N, K, r, dtype, seed=0, zero_row=True):
    x, V, A, B = (
        random(T, K, seed=seed),
        random(N, K, seed=seed + 1),
        random(r, K, seed=seed + 2) / K**0.5,
        random(N, r),
    )
    m, bias = random(N, seed=seed + 3).abs() + 0.5, random(N, seed=seed + 4)
    m_b = (torch.arange(N) % 3 != 1).float()
    if zero_row and N > 2:
        V[2], B[2] = 0, 0
    return [t.to(dtype) for t in (x, V, A, B)] + [m, m_b, bias]


def squares(V):
    return V.double().square().sum(1).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 577), (129, 372)])
def test_gain(N, K, r, dtype):
    _, V, A, B, m, m_b, _ = case(1, N, K, r, dtype)
    gain, inv_norm = gain_kernels.dora_gain(V, A, B, m, m_b, 0.7, squares(V))
    W = V.double() + 0.7 * (B.double() @ A.double())
    norm = W.square().sum(1).sqrt()
    want = torch.where(norm > 0, 1 / norm, 0.0)
    # Sums of K squares and of r products, in fp32: relative errors of the norm.
    bound = (K + r * 4) * UNIT * 4 * want + 1e-30
    within(inv_norm, want, bound)
    within(gain, want * m.double() * m_b.double(), bound * m.double())
    assert gain.dtype == inv_norm.dtype == torch.float32 and bool((inv_norm[norm == 0] == 0).all())
    unmasked, _ = gain_kernels.dora_gain(V, A, B, m, None, 0.7, squares(V))
    within(unmasked, want * m.double(), bound * m.double())


def test_gain_takes_fp32_factors_and_strided_inputs():
    _, V, A, B, m, m_b, _ = case(1, 70, 260, 16, torch.float32)
    V, A, B = V.bfloat16(), A.bfloat16().float(), B.bfloat16().float()  # casts in the interpreter cut off, a GPU rounds
    gain, inv_norm = gain_kernels.dora_gain(
        strided(V), strided(A), strided(B), strided(m), strided(m_b), 2.0, squares(V)
    )
    W = V.double() + 2.0 * (B.double() @ A.double())
    want = torch.where(W.square().sum(1) > 0, W.square().sum(1).rsqrt(), 0.0)
    within(inv_norm, want, 400 * UNIT * want)
    within(gain, want * m.double() * m_b.double(), 500 * UNIT * want * m.double())


def test_gain_of_nothing():
    V, A, B, m = torch.zeros(4, 0), torch.zeros(2, 0), torch.ones(4, 2), torch.ones(4)
    assert gain_kernels.dora_gain(V, A, B, m, None, 1.0, squares(V))[1].tolist() == [0.0] * 4
    V = torch.zeros(0, 8)
    none = gain_kernels.dora_gain(V, torch.zeros(2, 8), torch.ones(0, 2), torch.ones(0), None, 1.0, squares(V))
    assert none[0].shape == (0,)


ROUTES = {"compose": 0, "fused": 10**9}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "r"), [(1, 1, 1, 1), (5, 577, 372, 8), (129, 130, 65, 64), (70, 40, 33, 200), (3, 17, 520, 512)]
)
def test_linear_forward(T, N, K, r, dtype, route, monkeypatch):
    monkeypatch.setattr(linear_kernels, "FUSED_BELOW", ROUTES[route])
    x, V, A, B, m, m_b, bias = case(T, N, K, r, dtype)
    gain = m * m_b
    for with_bias, keep_z in itertools.product((True, False), repeat=2):
        b = bias * m_b if with_bias else None
        gain = strided(gain)
        poisoned_empty(monkeypatch)
        y, z, p, add_low = linear_kernels.forward(x, V, A, B, gain, b, 0.5, None, keep_z)
        want_z, want_y = dora(x, V, A, B, gain, b, 0.5)
        # p is rounded to dtype; so is z between the vendor's product and compose.
        size_z = (
            x.double().abs() @ V.double().abs().T + 0.5 * (x.double().abs() @ A.double().abs().T) @ B.double().abs().T
        )
        eps = torch.finfo(dtype).eps
        bound = size_z * (K + r + 2) * UNIT + 2 * eps * size_z
        within(y, want_y, gain.double() * bound + eps * want_y.abs() + 1e-30)
        assert bool((y[:, gain == 0] == (0 if b is None else b[gain == 0].to(dtype))).all())
        if keep_z:
            whole = z.double() + (0.5 * p.double() @ B.double().T if add_low else 0)
            within(whole, want_z, bound)
        assert y.dtype == dtype and p.shape == (T, r)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "r", "add_low"),
    [(1, 1, 1, True), (5, 577, 8, True), (300, 65, 32, True), (300, 65, 64, False), (129, 33, 200, False)],
)
def test_linear_backward(T, N, r, add_low, dtype, monkeypatch):
    dy, z, p, B = (random(*s, seed=i).to(dtype) for i, s in enumerate(((T, N), (T, N), (T, r), (N, r))))
    gain = random(N, seed=9) * (torch.arange(N) % 4 != 1)
    poisoned_empty(monkeypatch)
    bias = random(N, seed=10)
    found = linear_kernels.backward(dy, z, p, B, gain, bias, 0.5, add_low, True, True, True, True)
    dz, d_gain, d_bias, d_probe = found
    whole = z.double() + (0.5 * p.double() @ B.double().T if add_low else 0)
    size = z.double().abs() + (0.5 * p.double().abs() @ B.double().abs().T if add_low else 0)
    within(dz, gain.double() * dy.double(), torch.finfo(dtype).eps * (gain.double() * dy.double()).abs())
    part = dy.double() * z.double()  # the low-rank part is left to who has dy^T p
    within(d_gain, part.sum(0), (T + 2) * UNIT * part.abs().sum(0))
    within(d_bias, dy.double().sum(0), (T + 2) * UNIT * dy.double().abs().sum(0))
    lost, most = (
        dy.double() * (gain.double() * whole + bias),
        dy.double().abs() * (gain.double().abs() * size + bias.abs()),
    )
    within(d_probe, lost.square().sum(0), (T + 4 * r + 8) * UNIT * most.square().sum(0))
    again = linear_kernels.backward(strided(dy), z, p, strided(B), gain, bias, 0.5, add_low, True, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    none = linear_kernels.backward(dy, z, p, B, gain, None, 0.5, add_low, False, False, False, False)
    assert [t.numel() for t in none] == [0, 0, 0, 0]
    alone = linear_kernels.backward(dy, z, p, B, gain, None, 0.5, add_low, False, False, False, True)[3]
    lost = dy.double() * gain.double() * whole
    within(alone, lost.square().sum(0), (T + 4 * r + 8) * UNIT * most.square().sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", (1, 8, 64, 200))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 577), (129, 372)])
def test_merge(N, K, r, dtype, monkeypatch):
    _, V, A, B, m, m_b, _ = case(1, N, K, r, dtype)
    A, B, gain = A.float(), B.float(), m * m_b
    want = gain.double()[:, None] * (V.double() + 0.7 * (B.double() @ A.double()))
    size = gain.double()[:, None] * (V.double().abs() + 0.7 * (B.double().abs() @ A.double().abs()))
    rows, cols = torch.arange(0, N, 2), torch.arange(K % 2, K, 3)
    poisoned_empty(monkeypatch)
    for n, k in itertools.product((None, rows), (None, cols)):
        W = merge_kernels.dora_merge(strided(V), A, B, gain, n, k, 0.7)
        part = [t if n is None else t[n] for t in (want, size)]
        part = [t if k is None else t[:, k] for t in part]
        within(W, part[0], (r + 3) * UNIT * part[1] + torch.finfo(dtype).eps * part[0].abs())
        assert W.dtype == dtype
