"""Triton kernels of compact layers on the CPU, in Triton's interpreter, against float64. Run by test_interpreter.py."""

import itertools
import math

import pytest
import torch

from prunekern.kernels import compact_finish as finish_kernels
from prunekern.kernels import compact_linear as linear_kernels
from prunekern.kernels import compact_mlp as mlp_kernels
from prunekern.ops import compact_linear_triton as on_gpu
from tests.helpers.kernel_definitions import DEVICE, UNIT, poisoned_empty, random, strided, within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
}


def kept(count, of, seed):
    """Sorted indices, the first or the last channel removed now and then."""
    order = torch.randperm(of, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)
    return order[:count].sort().values


def exact(x, W, bias, in_index, out_index, n_out, activation, residual, scale):
    """(y, bound of the products' rounding) in float64."""
    x, W = x.double(), W.double()
    W = W if scale is None else W * scale.double()[:, None]
    x = x if in_index is None else x[:, in_index]
    z, size = x @ W.T, x.abs() @ W.abs().T
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    # No activation is steeper than 1.13 (gelu); act itself is good to a few units of fp32.
    part, bound = ACTIVATIONS[activation](z), 1.13 * (W.shape[1] + 2) * UNIT * size + 8 * UNIT * z.abs()
    if out_index is not None:
        part, bound = (torch.zeros(len(x), n_out).double().index_copy(1, out_index, t) for t in (part, bound))
    return (part if residual is None else part + residual.double()), bound


def check(y, want, bound, dtype):
    within(y, want, bound + torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny)
    assert y.dtype == dtype


SIZES = [(1, 1, 1, 1, 1), (5, 577, 372, 600, 400), (129, 64, 65, 150, 65), (17, 130, 33, 131, 40), (3, 1, 20, 300, 20)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K", "n_out", "n_in"), SIZES)
def test_linear(M, N, K, n_out, n_in, dtype, monkeypatch):
    poisoned_empty(monkeypatch)
    # Every combination on every size and dtype; of strides one kind each, the other kind on the next.
    turn = SIZES.index((M, N, K, n_out, n_in)) + DTYPES.index(dtype)
    for i, (gather, scatter, with_residual) in enumerate(itertools.product((True, False), repeat=3)):
        x = random(M, n_in if gather else K, seed=1).to(dtype)
        W, bias = (random(N, K, seed=2) / K**0.5).to(dtype), random(N, seed=3).to(dtype)
        in_index = kept(K, n_in, 4) if gather else None
        out_index = kept(N, n_out, 5) if scatter else None
        out = n_out if scatter else N
        residual = random(M, out, seed=6).to(dtype) if with_residual else None
        args = (x, W, bias if with_residual else None, in_index, out_index, out, "none", residual, None)
        loose = (strided(x), strided(W), args[2], in_index, out_index, out, "none",
                 None if residual is None else strided(residual), None)  # fmt: skip
        check(linear_kernels.compact_linear(*(loose if (turn + i) % 2 else args)), *exact(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    x, W, bias = (3 * random(40, 33)).to(dtype), random(50, 33, seed=1).to(dtype), random(50, seed=2)
    args = (x, W, bias, None, None, 50, activation, None, None)
    check(linear_kernels.compact_linear(*args), *exact(*args), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds_of_weights(dtype):
    """int8 with its scale, bf16 and fp32 weights, whatever x is."""
    x, scale = (random(20, 65) / 1000).to(dtype), random(40, seed=2).abs() / 50
    q = (100 * random(40, 65, seed=3)).clamp(-127, 127).to(torch.int8)
    beyond_fp16 = 1e5 * random(40, 65, seed=5).bfloat16()  # a product in x's 16 bits would be infinite
    weights = [(q, scale), (random(40, 65, seed=4).to(dtype), None), (random(40, 65, seed=6), None)]
    weights.append((beyond_fp16, None))
    for W, s in weights:
        args = (x, W, None, None, None, 40, "silu", None, s)
        check(linear_kernels.compact_linear(*args), *exact(*args), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation):
    x = random(5, 33)
    x[2, 7] = float("nan")
    args = (x, random(20, 33, seed=1), None, None, None, 20, activation, None, None)
    assert torch.equal(linear_kernels.compact_linear(*args).isnan().any(1), x.isnan().any(1))


MANY = [(8, 1, 1, 1), (9, 577, 37, 600), (300, 130, 64, 131)]


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("M", "N", "K", "n_out"), MANY)
def test_many_rows_by_the_vendor(M, N, K, n_out, dtype, monkeypatch):
    """Its product, and one pass for the rest; z is rounded to 16 bits between them."""
    monkeypatch.setattr(finish_kernels, "VENDOR_ROWS", 8)
    x, W, bias = random(M, K, seed=1).to(dtype), (random(N, K, seed=2) / K**0.5).to(dtype), random(N, seed=3)
    assert finish_kernels.takes_vendor(x, None, W) and not finish_kernels.takes_vendor(x[:7], None, W)
    assert not finish_kernels.takes_vendor(x, None, W.float())
    eps = torch.finfo(dtype).eps
    rounded = 1.13 * eps * (x.double() @ W.double().T).abs()
    poisoned_empty(monkeypatch)
    # Sizes and dtypes turn the activations, so that each of the eight combinations meets all five.
    turn = 2 * MANY.index((M, N, K, n_out)) + DTYPES[1:].index(dtype)
    for i, (scatter, with_bias, with_residual) in enumerate(itertools.product((True, False), repeat=3)):
        activation = list(ACTIVATIONS)[(turn + i) % len(ACTIVATIONS)]
        out_index, out = (kept(N, n_out, 5), n_out) if scatter else (None, N)
        residual = random(M, out, seed=6).to(dtype) if with_residual else None
        args = (x, W, bias if with_bias else None, None, out_index, out, activation, residual, None)
        want, bound = exact(*args)
        extra = torch.zeros(M, out).double().index_copy(1, out_index, rounded) if scatter else rounded
        check(linear_kernels.compact_linear(*args), want, bound + extra, dtype)
        loose = (strided(x), strided(W), *args[2:7], None if residual is None else strided(residual), None)
        check(linear_kernels.compact_linear(*loose), want, bound + extra, dtype)


@pytest.mark.parametrize("activation", ("none", "gelu"))
@pytest.mark.parametrize("scatter", (False, True))
@pytest.mark.parametrize(("rows", "K"), ((3, 20), (9, 20), (9, 32), (20, 20), (20, 0)))
def test_inputs_lined_up_for_many_rows(rows, K, scatter, activation, monkeypatch):
    """Gathered once from 8 rows on, padded to a multiple of 16 from 16 on; what is removed may hold anything."""
    monkeypatch.setattr(on_gpu, "GATHER_ROWS", 8)
    monkeypatch.setattr(on_gpu, "PAD_ROWS", 16)
    for gather in (False, True):
        x, W = random(2, rows // 2, 50 if gather else K), random(30, K, seed=1) / 4
        x = random(rows, 50 if gather else K)[None] if rows % 2 else x
        in_index, out_index = kept(K, 50, 2) if gather else None, kept(30, 40, 3) if scatter else None
        n_out = 40 if scatter else 30
        if gather:
            removed = torch.ones(50, dtype=torch.bool).index_fill(0, in_index, False)
            x[..., removed] = float("nan")
        residual = random(*x.shape[:-1], n_out, seed=4)
        y = on_gpu.run_triton(x, W, None, in_index, out_index, n_out, activation, residual, None)
        two = (t.reshape(-1, t.shape[-1]) if t.numel() else t.new_zeros(rows, 0) for t in (x, residual))
        flat, added = two
        want, bound = exact(flat, W, None, in_index, out_index, n_out, activation, added, None)
        check(y.reshape(-1, n_out), want, bound + 1e-6, torch.float32)
        _, index, (w,) = on_gpu.lined_up(x, in_index, W)
        assert (index is None) == (not gather or (rows >= 8 and K > 0))
        assert w.shape[1] == (32 if K == 20 and rows >= 16 else K)


def test_nothing_kept_leaves_the_residual():
    x, W, out_index = random(4, 8), torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    residual = random(4, 6, seed=1)
    assert torch.equal(linear_kernels.compact_linear(x, W, None, None, out_index, 6, "none", residual, None), residual)
    assert not linear_kernels.compact_linear(x, W, None, None, out_index, 6, "none", None, None).any()
    y = linear_kernels.compact_linear(x[:, :0], torch.zeros(6, 0), None, None, None, 6, "none", residual, None)
    assert torch.equal(y, residual)


@pytest.mark.parametrize("vendor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("M", "H", "K", "n_in"), [(1, 1, 1, 1), (5, 577, 129, 150), (129, 65, 33, 33)])
def test_gated(M, H, K, n_in, activation, dtype, vendor, monkeypatch):
    monkeypatch.setattr(finish_kernels, "VENDOR_ROWS", 1 if vendor else 10**9)
    poisoned_empty(monkeypatch)
    x, index = random(M, n_in, seed=1).to(dtype), kept(K, n_in, 2) if n_in != K else None
    up, gate = ((random(H, K, seed=s) / K**0.5).to(dtype) for s in (3, 4))
    up_bias, gate_bias = random(H, seed=5), random(H, seed=6)
    got = mlp_kernels.compact_gated(x, up, gate, up_bias, gate_bias, None, None, index, activation)
    u, u_bound = exact(x, up, up_bias, index, None, H, "none", None, None)
    g, g_bound = exact(x, gate, gate_bias, index, None, H, activation, None, None)
    if vendor and index is None and dtype != torch.float32:  # both are rounded on their way
        eps = torch.finfo(dtype).eps
        u_bound = u_bound + eps * (u - up_bias.double()).abs()
        g_bound = g_bound + 1.13 * eps * (x.double() @ gate.double().T).abs()
    check(got, u * g, u_bound * g.abs() + g_bound * u.abs() + u_bound * g_bound, dtype)
