"""dora_gain against the definition in float64: forms V + s B A, takes the norm of each row."""

import numpy as np
import pytest
import torch

from prunekern.ops import dora_gain, row_sqnorm
from prunekern.ops.dora_gain import dora_gain_reference

torch.set_num_threads(1)

SHAPES = [(577, 372, 8), (1, 1, 1), (577, 1, 1), (1, 372, 8), (372, 577, 64), (64, 768, 1)]
SCALE = 1.75


def inputs(N, K, r, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    V, A, B = normal(N, K), normal(r, K), 0.2 * normal(N, r)
    m, m_b = normal(N), (torch.rand(N, generator=g) > 0.4).double()
    return [t.to(dtype) for t in (V, A, B, m, m_b)]


def definition(V, A, B, m, m_b, s=SCALE):
    """In numpy, float64: (gain, inv_norm)."""
    V, A, B, m, m_b = (t.detach().double().numpy() for t in (V, A, B, m, m_b))
    norm = np.sqrt(np.square(V + s * B @ A).sum(1))
    inv_norm = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    return torch.from_numpy(m_b * m * inv_norm), torch.from_numpy(inv_norm)


def tolerance(V, A, B, s=SCALE):
    """Relative, by row: rounding of the three terms of the factored norm, each against what is left of their sum.

    Sums of K and r^2 products grow like the square root of their length; the terms may cancel, which
    `terms / sqnorm` measures. inv_norm is the -1/2 power: half the relative error.
    """
    V, A, B = V.double(), A.double(), B.double()
    low = s * B @ A
    terms = V.square().sum(1) + 2 * (V * low).abs().sum(1) + low.square().sum(1)
    conditioned = terms / (V + low).square().sum(1)
    length = (V.shape[1] + A.shape[0] ** 2) ** 0.5
    return 0.5 * conditioned * 2 * length * torch.finfo(torch.float32).eps + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("N,K,r", SHAPES)
def test_fp32_matches_definition(N, K, r):
    V, A, B, m, m_b = inputs(N, K, r)
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert gain.dtype == inv_norm.dtype == torch.float32 and gain.shape == inv_norm.shape == (N,)
    want_gain, want_inv = definition(V, A, B, m, m_b)
    tol = tolerance(V, A, B)
    assert ((inv_norm - want_inv).abs() <= tol * want_inv).all()
    assert ((gain - want_gain).abs() <= tol * want_gain.abs()).all()
    assert (gain[m_b == 0] == 0).all()


@pytest.mark.parametrize("N,K,r", SHAPES)
def test_float64_matches_definition(N, K, r):
    V, A, B, m, m_b = inputs(N, K, r, torch.float64)
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert gain.dtype == torch.float64
    want_gain, want_inv = definition(V, A, B, m, m_b)
    torch.testing.assert_close(inv_norm, want_inv, rtol=1e-12, atol=0)
    torch.testing.assert_close(gain, want_gain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    # The definition reads the same rounded inputs, so the bound stays that of fp32; a 16-bit product on CPU could
    # also kill the process.
    V, A, B, m, m_b = inputs(129, 372, 8, dtype)
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert gain.dtype == inv_norm.dtype == torch.float32
    want_gain, want_inv = definition(V, A, B, m, m_b)
    tol = tolerance(V, A, B)
    assert ((inv_norm - want_inv).abs() <= tol * want_inv).all()
    assert ((gain - want_gain).abs() <= tol * want_gain.abs()).all()


def test_reference_beside_the_op_is_the_definition():
    V, A, B, m, m_b = inputs(37, 53, 5, torch.float64)
    for mask in (m_b, None):
        gain, inv_norm = dora_gain_reference(V, A, B, m, mask, SCALE)
        want = definition(V, A, B, m, torch.ones_like(m) if mask is None else mask)
        torch.testing.assert_close(gain, want[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(inv_norm, want[1], rtol=1e-13, atol=0)


def test_without_mask_equals_all_kept():
    V, A, B, m, _ = inputs(65, 33, 4)
    none, _ = dora_gain(V, A, B, m, None, SCALE, row_sqnorm(V))
    ones, _ = dora_gain(V, A, B, m, torch.ones(65), SCALE, row_sqnorm(V))
    assert torch.equal(none, ones)


def test_non_contiguous_inputs():
    V, A, B, m, m_b = inputs(129, 37, 8)
    plain = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    wide = torch.full((129, 74), float("nan"))
    wide[:, ::2] = V
    strided = [wide[:, ::2], A.T.contiguous().T, B.T.contiguous().T, m.repeat_interleave(3)[::3], m_b.flip(0).flip(0)]
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    got = dora_gain(*strided, SCALE, row_sqnorm(strided[0]))
    want = definition(V, A, B, m, m_b)
    for g, p, w in zip(got, plain, want, strict=True):
        torch.testing.assert_close(g, p, rtol=1e-6, atol=0)
        assert ((g - w).abs() <= tolerance(V, A, B) * w.abs()).all()


def test_row_sqnorm():
    V = inputs(65, 372, 1)[0]
    assert row_sqnorm(V).dtype == torch.float32
    torch.testing.assert_close(
        row_sqnorm(V).double(), V.double().square().sum(1), rtol=372**0.5 * torch.finfo(torch.float32).eps, atol=0
    )
    half = V.to(torch.bfloat16)
    assert row_sqnorm(half).dtype == torch.float32
    torch.testing.assert_close(row_sqnorm(half).double(), half.double().square().sum(1), rtol=3e-6, atol=0)
    assert row_sqnorm(V.double()).dtype == torch.float64
    assert not row_sqnorm(torch.nn.Parameter(V)).requires_grad


def test_all_zero_row_has_inv_norm_zero_not_nan():
    V, A, B, m, m_b = inputs(9, 31, 3)
    V[4], B[4], m_b[4] = 0, 0, 1
    m.requires_grad_(True)
    m_b.requires_grad_(True)
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert inv_norm[4] == 0 and gain[4] == 0
    gain.sum().backward()
    assert torch.isfinite(m.grad).all() and torch.isfinite(m_b.grad).all()
    assert m.grad[4] == 0


def test_row_that_cancels_exactly_is_a_zero_row():
    # Small integers: every product and sum is exact in fp32, so V = -s B A leaves exactly nothing.
    g = torch.Generator().manual_seed(0)
    A = torch.randint(-3, 4, (4, 16), generator=g).float()
    B = torch.randint(-3, 4, (6, 4), generator=g).float()
    V = torch.randint(-3, 4, (6, 16), generator=g).float()
    V[2] = -2.0 * (B @ A)[2]
    gain, inv_norm = dora_gain(V, A, B, torch.ones(6), None, 2.0, row_sqnorm(V))
    assert inv_norm[2] == 0 and gain[2] == 0
    assert torch.isfinite(inv_norm).all() and (inv_norm[[0, 1, 3, 4, 5]] > 0).all()


def test_gradcheck_m_and_mask():
    V, A, B, m, m_b = inputs(7, 11, 3, torch.float64)
    v_sqnorm = row_sqnorm(V)
    m.requires_grad_(True)
    m_b = torch.rand(7, dtype=torch.float64, requires_grad=True)  # a value between, so that both factors count
    assert torch.autograd.gradcheck(lambda m, m_b: dora_gain(V, A, B, m, m_b, SCALE, v_sqnorm)[0], (m, m_b))
    assert torch.autograd.gradcheck(lambda m: dora_gain(V, A, B, m, None, SCALE, v_sqnorm)[0], (m,))


def test_masked_channel_still_gets_its_mask_gradient():
    V, A, B, m, _ = inputs(7, 11, 3, torch.float64)
    m_b = torch.tensor([1.0, 0, 1, 0, 0, 1, 1], dtype=torch.float64, requires_grad=True)
    m.requires_grad_(True)
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    gain.sum().backward()
    torch.testing.assert_close(m_b.grad, (m * inv_norm).detach(), rtol=1e-14, atol=0)
    assert (m_b.grad != 0).all()
    assert (m.grad[m_b == 0] == 0).all() and (m.grad[m_b == 1] != 0).all()


def test_norm_is_detached():
    V, A, B, m, m_b = (t.requires_grad_(True) for t in inputs(7, 11, 3, torch.float64))
    gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert not inv_norm.requires_grad
    gain.sum().backward()
    assert V.grad is None and A.grad is None and B.grad is None and m.grad is not None


@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(masked):
    V, A, B, m, m_b = inputs(9, 13, 3)
    m.requires_grad_(True)
    m_b.requires_grad_(True)
    args = (V, A, B, m, m_b if masked else None, SCALE, row_sqnorm(V))
    torch.library.opcheck(torch.ops.prunekern.dora_gain.default, args)


def test_compile_fullgraph_forward_and_backward():
    V, A, B, m, m_b = inputs(33, 17, 4)
    v_sqnorm = row_sqnorm(V)

    def run(f):
        leaves = [t.clone().requires_grad_(True) for t in (m, m_b)]
        gain, inv_norm = f(*leaves)
        gain.square().sum().backward()
        return gain.detach(), inv_norm, *(t.grad for t in leaves)

    def f(m, m_b):
        return dora_gain(V, A, B, m, m_b, SCALE, v_sqnorm)

    torch._dynamo.reset()
    for got, want in zip(run(torch.compile(f, fullgraph=True)), run(f), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_autocast_keeps_gain_fp32():
    V, A, B, m, m_b = inputs(65, 33, 4)
    want = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gain, inv_norm = dora_gain(V, A, B, m, m_b, SCALE, row_sqnorm(V))
    assert gain.dtype == inv_norm.dtype == torch.float32
    torch.testing.assert_close(gain, want, rtol=1e-6, atol=0)


def bad(**changes):
    V, A, B, m, m_b = inputs(6, 10, 2)
    args = {"V": V, "A": A, "B": B, "m": m, "m_b": m_b, "s": 1.0, "v_sqnorm": row_sqnorm(V)} | changes
    return lambda: dora_gain(*args.values())


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"V": torch.zeros(10)}, ValueError, r"dora_gain: V must have shape \[\*, \*\] \(got \[10\]\)"),
        ({"A": torch.zeros(2, 9)}, ValueError, r"dora_gain: A must have shape \[2, 10\] \(got \[2, 9\]\)"),
        ({"A": torch.zeros(())}, ValueError, r"dora_gain: A must have shape \[\*, 10\] \(got \[\]\)"),
        ({"B": torch.zeros(6, 3)}, ValueError, r"dora_gain: B must have shape \[6, 2\] \(got \[6, 3\]\)"),
        ({"m": torch.zeros(5)}, ValueError, r"dora_gain: m must have shape \[6\] \(got \[5\]\)"),
        ({"m_b": torch.zeros(1)}, ValueError, r"dora_gain: m_b must have shape \[6\] \(got \[1\]\)"),
        ({"v_sqnorm": torch.zeros(6, 1)}, ValueError, r"dora_gain: v_sqnorm must have shape \[6\] \(got \[6, 1\]\)"),
        (
            {"V": torch.zeros(6, 10, dtype=torch.int8)},
            TypeError,
            r"dora_gain: V must be float64, .* \(got torch.int8\)",
        ),
        ({"m": torch.zeros(6, dtype=torch.int64)}, TypeError, r"dora_gain: m must be float64, .* \(got torch.int64\)"),
        ({"A": torch.zeros(2, 10, device="meta")}, ValueError, r"dora_gain: A is on meta, V on cpu"),
        ({"v_sqnorm": torch.zeros(6, device="meta")}, ValueError, r"dora_gain: v_sqnorm is on meta, V on cpu"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        bad(**change)()


def test_wrong_shape_is_refused_while_compiling_too():
    with pytest.raises(Exception, match=r"dora_gain: B must have shape \[6, 2\] \(got \[6, 3\]\)"):
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            bad(B=torch.zeros(6, 3))()
