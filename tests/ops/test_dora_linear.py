"""dora_linear against the definition in float64 numpy: one weight for V, one for the low-rank branch."""

import importlib

import numpy as np
import pytest
import torch

from prunekern.ops import dora_linear
from prunekern.ops.dora_linear import dora_linear_reference
from prunekern.ops.narrow import bf16_matmul_crashes

op = importlib.import_module("prunekern.ops.dora_linear")  # the name in prunekern.ops is the function

torch.set_num_threads(1)

SCALE = 1.75
SHAPES = [
    (T, N, K, r) for T in (1, 5, 129) for N, K, r in ((577, 372, 8), (1, 372, 1), (577, 1, 1), (1, 1, 1), (128, 64, 64))
]


def inputs(T, N, K, r, dtype=torch.float32, seed=0, x_lora=False):
    """x, V, A, B, gain, bias[, x_lora]; a third of the channels masked (gain and bias 0)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gain, bias = 0.5 + torch.rand(N, generator=g, dtype=torch.float64), normal(N)
    masked = torch.rand(N, generator=g) < 0.3
    gain[masked], bias[masked] = 0, 0
    full = torch.float64 if dtype == torch.float64 else torch.float32
    result = [t.to(dtype) for t in (normal(T, K), normal(N, K), normal(r, K), normal(N, r))]
    result += [gain.to(full), bias.to(full)]
    return result + [normal(T, K).to(dtype)] * x_lora


def definition(x, V, A, B, gain, bias, x_lora=None, s=SCALE):
    """(y, the same with every term's absolute value) in float64."""
    x, V, A, B, gain = (t.detach().double().numpy() for t in (x, V, A, B, gain))
    bias = 0.0 if bias is None else bias.detach().double().numpy()
    low = x if x_lora is None else x_lora.detach().double().numpy()
    y = gain * (x @ V.T + s * low @ (B @ A).T) + bias
    size = np.abs(gain) * (np.abs(x) @ np.abs(V).T + s * np.abs(low) @ (np.abs(B) @ np.abs(A)).T) + np.abs(bias)
    return torch.from_numpy(y), torch.from_numpy(size)


def bound(size, K, r, out=torch.float32, y=None):
    """Rounding of sums of K and r products grows like the square root of their number; then one cast to `out`."""
    eps = torch.finfo(torch.float32).eps
    limit = 2 * (K + r) ** 0.5 * eps * size + 4 * eps * size
    return limit if out == torch.float32 else limit + torch.finfo(out).eps * y.abs() + torch.finfo(out).tiny


@pytest.mark.parametrize("T,N,K,r", SHAPES)
@pytest.mark.parametrize("x_lora", [False, True])
def test_fp32_matches_definition(T, N, K, r, x_lora):
    args = inputs(T, N, K, r, x_lora=x_lora)
    for bias in (args[5], None):
        args[5] = bias
        y = dora_linear(*args[:6], SCALE, *args[6:])
        want, size = definition(*args)
        assert y.dtype == torch.float32 and y.shape == (T, N)
        assert ((y - want).abs() <= bound(size, K, r)).all()
        if bias is not None:
            assert (y[:, args[4] == 0] == 0).all()


@pytest.mark.parametrize("T,N,K,r", SHAPES)
@pytest.mark.parametrize("x_lora", [False, True])
def test_gradients_in_fp32_match_definition(T, N, K, r, x_lora):
    """Each gradient is a product of matrices; its rounding is bounded by the same product of absolute values."""
    args = inputs(T, N, K, r, x_lora=x_lora)
    leaves = [a.requires_grad_(True) if i != 1 else a for i, a in enumerate(args)]
    dy = torch.randn(T, N, generator=torch.Generator().manual_seed(1))
    dora_linear(*leaves[:6], SCALE, *leaves[6:]).backward(dy)
    got = {n: t.grad for n, t in zip(("x", "V", "A", "B", "gain", "bias", "x_lora"), leaves, strict=False)}
    assert got.pop("V") is None

    def want(f):
        x, V, A, B, gain, _, low = (f(t.detach().double()) for t in (*args, *([args[0]] * (not x_lora))))
        d = f(dy.double())
        dz = d * gain
        dp = SCALE * dz @ B
        grads = {"x": dz @ V, "A": dp.T @ low, "B": SCALE * dz.T @ (low @ A.T), "bias": d.sum(0)}
        grads["gain"] = (d * (x @ V.T + SCALE * low @ A.T @ B.T)).sum(0)
        if x_lora:
            return grads | {"x_lora": dp @ A}
        return grads | {"x": grads["x"] + dp @ A}

    exact, size = want(lambda t: t), want(torch.abs)
    assert got.keys() == exact.keys()
    length = (T + N + K + r) ** 0.5 + 4
    for name in exact:
        limit = 2 * length * torch.finfo(torch.float32).eps * size[name]
        assert ((got[name] - exact[name]).abs() <= limit).all(), name


@pytest.mark.parametrize("T,N,K,r", [(5, 577, 372, 8), (1, 1, 1, 1)])
def test_float64_matches_definition(T, N, K, r):
    args = inputs(T, N, K, r, torch.float64, x_lora=True)
    want, size = definition(*args)
    y = dora_linear(*args[:6], SCALE, *args[6:])
    assert y.dtype == torch.float64 and ((y - want).abs() <= 1e-14 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_lora", [False, True])
def test_16_bit_on_cpu_is_computed_in_fp32(dtype, x_lora, monkeypatch):
    """Where bf16 products are no faster, or would kill the process; fp16 everywhere."""
    monkeypatch.setattr(op, "multiplies_bf16", lambda: False)
    T, N, K, r = 5, 129, 372, 8
    args = inputs(T, N, K, r, dtype, x_lora=x_lora)
    args = [a.requires_grad_(i != 1) for i, a in enumerate(args)]
    y = dora_linear(*args[:6], SCALE, *args[6:])
    want, size = definition(*args)
    assert y.dtype == dtype
    assert ((y.double() - want).abs() <= bound(size, K, r, dtype, want)).all()
    y.sum().backward()  # a 16-bit product in the backward pass would kill the process on some CPUs
    for name, a in zip("xVABgb", args, strict=False):
        assert name == "V" or (a.grad.dtype == a.dtype and torch.isfinite(a.grad).all())
    # The gradient of gain is a sum of T products of fp32 numbers: no 16-bit rounding in it.
    low = args[0] if len(args) == 6 else args[6]
    x, V, A, B, low = (t.detach().double() for t in (*args[:4], low))
    z = x @ V.T + SCALE * low @ A.T @ B.T
    size = x.abs() @ V.abs().T + SCALE * low.abs() @ A.abs().T @ B.abs().T
    assert ((args[4].grad - z.sum(0)).abs() <= 2 * (K + r + T) ** 0.5 * 1.2e-7 * size.sum(0)).all()


@pytest.mark.skipif(bf16_matmul_crashes(), reason="needs a CPU whose AMX oneDNN can use, or none")
@pytest.mark.parametrize("T,N,K,r", [(5, 129, 372, 8), (1, 577, 1, 1), (64, 96, 129, 4)])
@pytest.mark.parametrize("x_lora", [False, True])
def test_bf16_on_cpu_multiplies_in_bf16(T, N, K, r, x_lora, monkeypatch):
    """Each term passes at most three roundings to bf16 on its way (of p or dz, of a product, of a sum) and the last."""
    monkeypatch.setattr(op, "multiplies_bf16", lambda: True)
    args = inputs(T, N, K, r, torch.bfloat16, x_lora=x_lora)
    args = [a.requires_grad_(i != 1) for i, a in enumerate(args)]
    y = dora_linear(*args[:6], SCALE, *args[6:])
    want, size = definition(*args)
    unit = torch.finfo(torch.bfloat16).eps / 2
    assert y.dtype == torch.bfloat16 and y.grad_fn is not None
    assert ((y.double() - want).abs() <= bound(size, K, r, torch.bfloat16, want) + 3 * unit * size).all()
    dy = torch.randn(T, N, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    y.backward(dy)
    exact = [a.detach().double().requires_grad_(i != 1) for i, a in enumerate(args)]
    dora_linear_reference(*exact[:6], SCALE, *exact[6:]).backward(dy.double())
    x, V, A, B, gain = (t.detach().double().abs() for t in args[:5])
    low = x if not x_lora else args[6].detach().double().abs()
    dz, p = dy.double().abs() * gain, low @ A.T
    low_x = SCALE * dz @ B @ A
    sizes = [
        dz @ V + (0 if x_lora else low_x), None, SCALE * (dz @ B).T @ low, SCALE * dz.T @ p,
        (dy.double().abs() * (x @ V.T + SCALE * p @ B.T)).sum(0), dy.double().abs().sum(0), low_x,
    ]  # fmt: skip
    for got, full, of in zip(args, exact, sizes, strict=False):
        if of is not None:
            assert got.grad.dtype == got.dtype
            assert ((got.grad.double() - full.grad).abs() <= 4.1 * unit * of + 1e-30).all()


def test_reference_beside_the_op_is_the_definition():
    args = inputs(5, 33, 17, 4, torch.float64, x_lora=True)
    torch.testing.assert_close(
        dora_linear_reference(*args[:6], SCALE, args[6]), definition(*args)[0], rtol=1e-12, atol=1e-12
    )
    args[5] = None
    torch.testing.assert_close(
        dora_linear_reference(*args[:6], SCALE), definition(*args[:6])[0], rtol=1e-12, atol=1e-12
    )


def test_gradcheck():
    x, V, A, B, gain, bias, x_lora = inputs(3, 6, 5, 2, torch.float64, x_lora=True)
    leaves = [t.requires_grad_(True) for t in (x, A, B, gain, bias, x_lora)]

    def both(x, A, B, gain, bias, x_lora):
        return dora_linear(x, V, A, B, gain, bias, SCALE, x_lora)

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(lambda x, A, B, g, b: dora_linear(x, V, A, B, g, b, SCALE), leaves[:5])
    assert torch.autograd.gradcheck(lambda x, A, B, g: dora_linear(x, V, A, B, g, None, SCALE), leaves[:4])


@pytest.mark.parametrize("wanted", range(6))
def test_each_gradient_alone(wanted):
    """What is saved for the backward pass depends on what needs a gradient: each one alone must come out the same."""
    args = inputs(5, 9, 7, 2, torch.float64, x_lora=True)
    order = [0, 2, 3, 4, 5, 6]

    def grads(indices):
        own = [a.clone().requires_grad_(i in indices) for i, a in enumerate(args)]
        dora_linear(*own[:6], SCALE, own[6]).square().sum().backward()
        return [own[i].grad for i in order]

    every, alone = grads(order), grads([order[wanted]])
    assert torch.equal(alone[wanted], every[wanted])
    assert all(g is None for i, g in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("x_lora", [False, True])
def test_leading_shapes_forward_and_backward(shape, x_lora):
    _, V, A, B, gain, bias = inputs(1, 9, 7, 2, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    low = torch.randn(shape, dtype=torch.float64, requires_grad=True) if x_lora else None
    leaves = [t.requires_grad_(True) for t in (A, B, gain, bias)]
    y = dora_linear(x, V, *leaves, SCALE, low)
    assert y.shape == (*shape[:-1], 9)
    flat = definition(x.reshape(-1, 7), V, *leaves, None if low is None else low.reshape(-1, 7))[0]
    torch.testing.assert_close(y.detach().reshape(-1, 9), flat, rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert x.grad.shape == x.shape and all(t.grad.shape == t.shape for t in leaves)
    if 0 in shape:
        assert all((t.grad == 0).all() for t in leaves)


def test_non_contiguous_inputs_and_incoming_gradient():
    T, N, K, r = 6, 9, 7, 2
    args = inputs(T, N, K, r, torch.float64, x_lora=True)

    def strided(t):
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2].detach()

    def run(own, dy):
        own = [a.requires_grad_(i != 1) for i, a in enumerate(own)]
        y = dora_linear(*own[:6], SCALE, own[6])
        y.backward(dy)
        return [y.detach(), *(a.grad for i, a in enumerate(own) if i != 1)]

    dy = torch.randn(1, N, dtype=torch.float64).expand(T, N)  # as .sum(0) hands it back
    plain = run([a.clone() for a in args], dy.contiguous())
    for got, want in zip(run([strided(a) for a in args], dy), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    three = args[0].reshape(3, 2, K).transpose(0, 1)  # a view that no reshape can flatten without a copy
    got = dora_linear(three, *args[1:6], SCALE)
    want = dora_linear(three.contiguous(), *args[1:6], SCALE)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_masked_channel_still_gets_its_mask_gradient():
    x, V, A, B, gain, bias = inputs(5, 9, 7, 2, torch.float64)
    m_b = torch.tensor([1.0, 0, 1, 0, 0, 1, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    y = dora_linear(x, V, A, B, m_b * 2.0, m_b * 3.0, SCALE)
    assert (y[:, m_b == 0] == 0).all()
    y.sum().backward()
    z = definition(x, V, A, B, torch.ones(9), None)[0]
    torch.testing.assert_close(m_b.grad, (2 * z + 3).sum(0), rtol=1e-12, atol=1e-12)


def test_gradients_are_bitwise_repeatable():
    args = inputs(129, 65, 37, 8, x_lora=True)

    def run():
        own = [a.clone().requires_grad_(i != 1) for i, a in enumerate(args)]
        dora_linear(*own[:6], SCALE, own[6]).square().sum().backward()
        return [a.grad for i, a in enumerate(own) if i != 1]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_trained_V_is_refused():
    args = inputs(2, 3, 4, 1)
    args[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"dora_linear: V must be frozen \(got V.requires_grad=True\)"):
        dora_linear(*args, SCALE).sum().backward()
    with torch.no_grad():  # nothing to differentiate, nothing to refuse
        dora_linear(*args, SCALE)


@pytest.mark.parametrize("x_lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, x_lora):
    args = inputs(3, 9, 7, 2, x_lora=x_lora)
    args = [a.requires_grad_(i != 1) for i, a in enumerate(args)]
    probe = torch.zeros(9, requires_grad=True)
    arguments = (*args[:5], args[5] if bias else None, SCALE, args[6] if x_lora else None, probe)
    torch.library.opcheck(torch.ops.prunekern.dora_linear_forward.default, arguments)
    # The outer op is composed of the inner one: no autograd formula of its own to check.
    torch.library.opcheck(
        torch.ops.prunekern.dora_linear.default, arguments, test_utils=("test_schema", "test_aot_dispatch_dynamic")
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_probe_gets_the_squares_of_dy_y_by_token(dtype, bias, monkeypatch):
    monkeypatch.setattr(op, "multiplies_bf16", lambda: False)
    args = inputs(5, 33, 17, 4, x_lora=False)[:6]
    x, V, A, B, gain, b = (a.to(dtype) if i < 4 else a.to(max(dtype, torch.float32, key=lambda d: d.itemsize))
                           for i, a in enumerate(args))  # fmt: skip
    b, dy = b if bias else None, torch.randn(5, 33).to(dtype)
    probe = torch.full((33,), float("nan"), requires_grad=True)  # its values are never read
    for only in (True, False):  # the probe alone, and with what else is trained
        for t in (x, A, B, gain):
            t.requires_grad_(not only)
        y = dora_linear(x, V, A, B, gain, b, SCALE, probe=probe)
        assert bool(y.isfinite().all())
        (found,) = torch.autograd.grad(y, probe, dy)
        exact = gain.double() * (x.double() @ (V.double() + SCALE * B.double() @ A.double()).T)
        exact = exact if b is None else exact + b.double()
        want = (dy.double() * exact).square().sum(0).float()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.max()))
    y, plain = (dora_linear(x, V, A, B, gain, b, SCALE, probe=p) for p in (probe, None))
    assert torch.equal(y, plain)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile_fullgraph_forward_and_backward(backend):
    args = inputs(5, 33, 17, 4, x_lora=True)

    def run(f):
        own = [a.clone().requires_grad_(i != 1) for i, a in enumerate(args)]
        y = f(*own[:6], SCALE, own[6])
        y.square().sum().backward()
        return [y.detach(), *(a.grad for i, a in enumerate(own) if i != 1)]

    torch._dynamo.reset()
    compiled = torch.compile(dora_linear, fullgraph=True, backend=backend)
    for got, want in zip(run(compiled), run(dora_linear), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_cpu_autocast_runs_in_16_bit_values_and_keeps_gain_fp32(monkeypatch):
    """bf16 holds 8 bits: a gain of 1 + 1/1024 would become 1. Here the products themselves stay in fp32."""
    monkeypatch.setattr(op, "multiplies_bf16", lambda: False)
    x, V, A, B, _, bias = inputs(5, 33, 17, 4)
    gain = torch.full((33,), 1 + 1 / 1024)
    leaves = [t.requires_grad_(True) for t in (x, A, B, gain, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dora_linear(x, V, A, B, gain, bias, SCALE)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    rounded = [t.detach().to(torch.bfloat16) for t in (x, V, A, B)]
    want, size = definition(*rounded, gain, bias)
    assert ((y.detach().double() - want).abs() <= bound(size, 17, 4, torch.bfloat16, want)).all()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    # d gain = column sums of z, from fp32 products of the rounded inputs
    z, size = definition(*rounded, torch.ones(33), None)
    assert ((gain.grad - z.sum(0)).abs() <= 2 * 26**0.5 * 1.2e-7 * size.sum(0)).all()


def test_autocast_leaves_float64_alone():
    args = inputs(3, 9, 7, 2, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dora_linear(*args, SCALE), dora_linear(*args, SCALE))
        assert dora_linear(*args, SCALE).dtype == torch.float64


def bad(**changes):
    names = ("x", "V", "A", "B", "gain", "bias")
    args = dict(zip(names, inputs(3, 6, 10, 2), strict=True)) | changes
    return dora_linear(*(args[n] for n in names), 1.0, args.get("x_lora"))


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"x": torch.zeros(3, 9)}, ValueError, r"x must have shape \[..., 10\] as V is \[6, 10\] \(got \[3, 9\]\)"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[..., 10\] as V is \[6, 10\] \(got \[\]\)"),
        ({"V": torch.zeros(6, 10, 1)}, ValueError, r"V must have shape \[\*, \*\] \(got \[6, 10, 1\]\)"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"A must have shape \[2, 10\] \(got \[2, 9\]\)"),
        ({"A": torch.zeros(())}, ValueError, r"A must have shape \[\*, 10\] \(got \[\]\)"),
        ({"B": torch.zeros(5, 2)}, ValueError, r"B must have shape \[6, 2\] \(got \[5, 2\]\)"),
        ({"gain": torch.zeros(1)}, ValueError, r"gain must have shape \[6\] \(got \[1\]\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \[6\] \(got \[7\]\)"),
        ({"x_lora": torch.zeros(2, 10)}, ValueError, r"x_lora must have shape \[3, 10\] \(got \[2, 10\]\)"),
        ({"x": torch.zeros(3, 10, dtype=torch.int64)}, TypeError, r"x must be float64, .* \(got torch.int64\)"),
        ({"gain": torch.ones(6, dtype=torch.bool)}, TypeError, r"gain must be float64, .* \(got torch.bool\)"),
        ({"bias": torch.ones(6, dtype=torch.int32)}, TypeError, r"bias must be float64, .* \(got torch.int32\)"),
        ({"V": torch.zeros(6, 10, device="meta")}, ValueError, r"V is on meta, x on cpu"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, r"bias is on meta, x on cpu"),
        ({"x_lora": torch.zeros(3, 10, device="meta")}, ValueError, r"x_lora is on meta, x on cpu"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match="dora_linear: " + message):
        bad(**change)
