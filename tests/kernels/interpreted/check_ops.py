"""The registered Triton ops in Triton's interpreter: gradients against float64, repeatability, opcheck.

Run by test_interpreter.py. The Triton ops are called by their own names: `prunekern.ops` would take the CPU path.
"""

from importlib import import_module

import pytest
import torch

from prunekern.kernels import dora_linear as kernels
from tests.helpers.kernel_definitions import UNIT, dora, random, strided, within

# By name: in `prunekern.ops` a function stands under each of them.
gain_ops, linear_ops, merge_ops, compact_ops, mlp_ops = (
    import_module(f"prunekern.ops.{name}")
    for name in ("dora_gain", "dora_linear", "dora_merge", "compact_linear", "compact_mlp")
)


def case(N=37, K=50, r=8, shape=(3, 7), seed=0):
    x, V, A, B = random(*shape, K, seed=seed), random(N, K, seed=1), random(r, K, seed=2) / 7, random(N, r, seed=3)
    return x, V, A, B, random(N, seed=4) * (torch.arange(N) % 3 != 0), random(N, seed=5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("r", [1, 8, 65, 512])
def test_gradients_of_dora_linear(r, fused, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED_BELOW", 10**9 if fused else 0)
    x, V, A, B, gain, bias = case(r=r)
    x_lora, weights = random(*x.shape, seed=8), random(3, 7, 37, seed=9)
    for own in (None, x_lora):
        leaves = [t.clone().requires_grad_() for t in (x, A, B, gain, bias) + (() if own is None else (own,))]
        y = linear_ops.triton_ops()[0](leaves[0], V, *leaves[1:5], 0.5, None if own is None else leaves[5], None, True)[
            0
        ]
        got = torch.autograd.grad((y * weights).sum(), leaves)
        exact = [t.double().clone().requires_grad_() for t in leaves]
        flat = exact[0].reshape(-1, 50)
        low = flat if own is None else exact[5].reshape(-1, 50)
        z = flat @ V.double().T + 0.5 * (low @ exact[1].T) @ exact[2].T
        want_y = (exact[3] * z + exact[4]).view(3, 7, 37)
        want = torch.autograd.grad((want_y * weights.double()).sum(), exact)
        torch.testing.assert_close(y.double(), want_y, rtol=1e-5, atol=1e-4)
        for name, a, b in zip("x A B gain bias x_lora".split(), got, want, strict=False):
            # Sums of up to K + N + r products; by the largest, as single entries cancel.
            assert (a - b).abs().max() <= 3e-6 * b.abs().max() * max(1, r) ** 0.5, name


def test_a_masked_channel_gets_its_mask_gradient():
    x, V, A, B, gain, bias = case()
    assert bool((gain == 0).any())
    gain = gain.requires_grad_()
    y, z, _ = linear_ops.triton_ops()[0](x, V, A, B, gain, bias, 0.5, None, None, True)
    y.sum().backward()
    want_z, _ = dora(x.reshape(-1, 50), V, A, B, gain.detach(), bias, 0.5)
    within(gain.grad, want_z.sum(0), 600 * UNIT * want_z.abs().sum(0))


def test_a_masked_channel_beyond_fp16_stays_finite(monkeypatch):
    """The sums of dy p over tokens come before gain; gain 0 leaves no gradient of B, and that of gain is finite."""
    monkeypatch.setattr(kernels, "FUSED_BELOW", 0)
    x, V, A, B, gain, _ = (t.half() for t in case(shape=(64,)))
    x[:], A[:] = 4, 1  # p = 200, and 64 dy p = 6e6
    gain = gain.float()
    B, gain = B.requires_grad_(), gain.requires_grad_()
    y = linear_ops.triton_ops()[0](x, V, A, B, gain, None, 0.5, None, None, True)[0]
    d_B, d_gain = torch.autograd.grad(y, (B, gain), torch.full_like(y, 500.0))
    assert not d_B[gain == 0].any()
    z = x.double() @ V.double().T + 0.5 * (x.double() @ A.double().T) @ B.double().T
    # z0, p and their product's sums are rounded to fp16 on their way, by half an eps each.
    size = x.double().abs() @ V.double().abs().T + 0.5 * (x.double() @ A.double().T).abs() @ B.double().abs().T
    within(d_gain, 500 * z.sum(0), 500 * 1.5 * torch.finfo(torch.float16).eps * size.sum(0))


def test_a_probe_gets_the_squares_by_token():
    x, V, A, B, gain, bias = case()
    probe, weights = torch.zeros(37, requires_grad=True), random(3, 7, 37, seed=9)
    y = linear_ops.triton_ops()[0](x, V, A, B, gain, bias, 0.5, None, probe, True)[0]
    (y * weights).sum().backward()
    _, want = dora(x.reshape(-1, 50), V, A, B, gain, bias, 0.5)
    torch.testing.assert_close(
        probe.grad.double(), (want * weights.reshape(-1, 37)).square().sum(0), rtol=1e-4, atol=1e-6
    )


def test_gradients_are_bitwise_repeatable():
    x, V, A, B, gain, bias = case(shape=(300,))
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, A, B, gain, bias)]
        y = linear_ops.triton_ops()[0](leaves[0], V, *leaves[1:], 0.5, None, None, True)[0]
        runs.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain_stays_fp32_where_products_have_16_bits(dtype):
    x, V, A, B, gain, bias = case()
    near_one = torch.full_like(gain, 1 + 2**-10)  # 1 in bf16
    x, V, A, B = (t.to(dtype) for t in (x, V, A, B))
    twice = [
        linear_ops.triton_ops()[0](x, V, A, B, g, None, 0.5, None, None, False)[0] for g in (near_one, near_one * 2)
    ]
    torch.testing.assert_close(twice[0] * 2, twice[1], rtol=0, atol=0)
    ones = linear_ops.triton_ops()[0](x, V, A, B, torch.ones_like(gain), None, 0.5, None, None, False)[0]
    assert bool((ones != twice[0]).any())


def test_gain_op_has_the_gradients_of_a_detached_norm():
    _, V, A, B, m, _ = case()
    m_b = (torch.arange(37) % 2).float()
    leaves = [t.clone().requires_grad_() for t in (m, m_b)]
    gain, inv_norm = gain_ops.triton_op()(V, A, B, *leaves, 0.5, gain_ops.row_sqnorm(V))
    d_m, d_mb = torch.autograd.grad((gain * torch.arange(37)).sum(), leaves)
    weights = torch.arange(37) * inv_norm
    torch.testing.assert_close(d_m, weights * m_b)
    torch.testing.assert_close(d_mb, weights * m)
    assert not inv_norm.requires_grad


def test_opcheck():
    x, V, A, B, gain, bias = case(N=5, K=6, r=2, shape=(4,))
    kept = torch.tensor([0, 3, 4])
    tests = (
        "test_schema",
        "test_autograd_registration",
    )  # fake tensors: test_tracing.py, as nothing is interpreted there
    calls = [
        (gain_ops.triton_op(), (V, A, B, gain.clone().requires_grad_(), None, 0.5, gain_ops.row_sqnorm(V))),
        (linear_ops.triton_ops()[0], (x, V, A, B, gain.clone().requires_grad_(), bias, 0.5, None, None, True)),
        (
            linear_ops.triton_ops()[1],
            (random(4, 5), random(4, 5), random(4, 2), B, gain, bias, 0.5, True, True, True, True, True),
        ),
        (merge_ops.triton_op(), (V, A, B, gain, kept, None, 0.5)),
        (compact_ops.triton_op(), (x, V, bias, None, kept.new_tensor([0, 1, 2, 4, 6]), 7, "gelu", random(4, 7), None)),
        (mlp_ops.triton_op(), (x, V, V, bias, None, None, None, None, "silu")),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils=tests)


def test_compact_ops_take_leading_dimensions(monkeypatch):
    x, W, bias = random(2, 3, 6), random(5, 6, seed=1), random(5, seed=2)
    out, residual = torch.tensor([0, 2, 3, 4, 7]), random(2, 3, 9, seed=3)
    got = compact_ops.run_triton(x, W, bias, None, out, 9, "relu", residual, None)
    want = residual.double()
    want[..., out] += (x.double() @ W.double().T + bias.double()).clamp(min=0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    plain = compact_ops.run_triton(strided(x), W, bias, None, None, 5, "none", None, None)
    torch.testing.assert_close(plain.double(), x.double() @ W.double().T + bias.double(), rtol=1e-5, atol=1e-5)
    gate, down = random(5, 6, seed=4), random(4, 5, seed=5)
    rest = (None, None, None, None, None, None, None, torch.tensor([1, 2, 5, 8]), 5, 9, "silu", residual)
    monkeypatch.setattr(mlp_ops, "compact_linear", lambda *a: compact_ops.run_triton(*a))
    got = mlp_ops._run_triton(x, W, down, gate, *rest)
    g, u = x.double() @ gate.double().T, x.double() @ W.double().T
    want = residual.double()
    want[..., [1, 2, 5, 8]] += (g / (1 + torch.exp(-g)) * u) @ down.double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
