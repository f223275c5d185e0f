"""compact_attention: numbers against float64, masks, gradients, tracing, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from prunekern import _native
from prunekern.ops import compact_attention
from prunekern.ops.compact_attention import compact_attention_reference

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
EPS = 2.0**-24  # of fp32
QK = (0, 20, 20, 21, 24, 72)  # heads of 20, 0, 1, 3 and 48 channels
V = (0, 3, 51, 52, 52, 85)  # of 3, 48, 1, 0 and 33


def inputs(batch, queries, keys, qk=QK, v=V, dtype=torch.float32, size=1.0, shared_by=1):
    torch.manual_seed(queries + keys)
    shapes = (batch, queries, shared_by * qk[-1]), (batch, keys, qk[-1]), (batch, keys, v[-1])
    q, k, v = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    return q * size, k, v


def mask_of(kind: str, batch: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    at, row = torch.arange(keys), torch.arange(batch)[:, None]
    if kind == "padding":
        return at < (keys - row * keys // 3).clamp(min=1)
    if kind == "holes":
        return (7 * at + row) % 3 != 0
    return (row % 2 == 1).expand(batch, keys)  # "nothing": some sequences may read no key at all


def naive(q, k, v, qk_first, v_first, key_mask, scale, shared_by=1, causal=False) -> tuple[Tensor, Tensor]:
    """Written out query by query in float64, allowed keys only: (y, bound on the error of an fp32 result)."""
    q, k, v = q.double(), k.double(), v.double()
    if causal or shared_by > 1:
        return naive_decoder(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal)
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    bound = torch.zeros_like(y)
    for s in range(q.shape[0]):
        allowed = slice(None) if key_mask is None else key_mask[s].nonzero().flatten()
        keys, values = k[s][allowed], v[s][allowed]
        if not len(keys):
            continue
        for a, b, c, d in zip(qk_first, qk_first[1:], v_first, v_first[1:], strict=False):
            logits = scale * q[s, :, a:b] @ keys[:, a:b].T
            rounding = (
                EPS * (b - a + 4) * abs(scale) * (q[s, :, a:b].abs() @ keys[:, a:b].abs().T).amax(1, keepdim=True)
            )
            p = torch.exp(logits - logits.amax(1, keepdim=True))
            p = p / p.sum(1, keepdim=True)
            y[s, :, c:d] = p @ values[:, c:d]
            # Each weight is off by exp(2 rounding) (its logit and the largest) and by 2^x (2e-7), above and below.
            off = torch.expm1(2 * rounding) + 4e-7 + (len(keys) + 4) * EPS
            bound[s, :, c:d] = 2 * off * (p @ values[:, c:d].abs()) + 1e-30
    return y, bound


def naive_decoder(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal):
    """One query of one query head at a time, as a call of `naive` on the keys it sees."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    y = torch.zeros(batch, queries, shared_by * v.shape[-1], dtype=torch.float64)
    bound = torch.zeros_like(y)
    key_mask = torch.ones(batch, keys, dtype=torch.bool) if key_mask is None else key_mask
    for a, b, c, d in zip(qk_first, qk_first[1:], v_first, v_first[1:], strict=False):
        for i in range(shared_by):
            own = slice(shared_by * a + i * (b - a), shared_by * a + (i + 1) * (b - a))
            out = slice(shared_by * c + i * (d - c), shared_by * c + (i + 1) * (d - c))
            for t in range(queries):
                end = keys - queries + t + 1 if causal else keys
                y[:, t : t + 1, out], bound[:, t : t + 1, out] = naive(
                    q[:, t : t + 1, own], k[:, :end, a:b], v[:, :end, c:d], (0, b - a), (0, d - c), key_mask[:, :end],
                    scale,
                )  # fmt: skip
    return y, bound


def assert_close(got: Tensor, y: Tensor, bound: Tensor) -> None:
    assert got.shape == y.shape
    excess = (got.double() - y).abs() - bound
    assert bool((excess <= 0).all()), f"off by {excess.max():.3g} more than rounding explains"


@pytest.mark.parametrize("kind", ["none", "padding", "holes", "nothing"])
@pytest.mark.parametrize("tokens", [1, 5, 129])
def test_against_float64(tokens, kind):
    q, k, v = inputs(3, tokens, tokens)
    mask = mask_of(kind, 3, tokens)
    if mask is not None:  # what nobody may read
        k[~mask], v[~mask] = float("nan"), float("nan")
    args = (q, k, v, QK, V, mask, 0.3)
    expected = naive(*args)
    assert_close(compact_attention(*args), *expected)
    assert_close(compact_attention(q, k, v, list(QK), list(V), mask, 0.3), *expected)  # not the short way
    assert_close(compact_attention_reference(*args), *expected)
    exact = compact_attention(q.double(), k.double(), v.double(), *args[3:])
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected[0], rtol=1e-12, atol=1e-12)


def test_more_keys_than_queries_and_several_blocks_of_keys():
    q, k, v = inputs(1, 7, 600)
    for kind in ("none", "holes"):
        args = (q, k, v, QK, V, mask_of(kind, 1, 600), 0.2)
        assert_close(compact_attention(*args), *naive(*args))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared_by", [1, 3])
@pytest.mark.parametrize("kind", ["none", "padding", "holes", "nothing"])
@pytest.mark.parametrize("queries,keys", [(1, 40), (7, 7), (17, 40)])
def test_grouped_and_causal_against_float64(queries, keys, kind, shared_by, causal):
    q, k, v = inputs(2, queries, keys, shared_by=shared_by)
    mask = mask_of(kind, 2, keys)
    if mask is not None:
        k[~mask], v[~mask] = float("nan"), float("nan")
    args = (q, k, v, QK, V, mask, 0.3, shared_by, causal)
    expected = naive(*args)
    assert_close(compact_attention(*args), *expected)
    assert_close(compact_attention(q, k, v, list(QK), list(V), *args[5:]), *expected)  # not the short way
    assert_close(compact_attention_reference(*args), *expected)
    exact = compact_attention(q.double(), k.double(), v.double(), *args[3:])
    torch.testing.assert_close(exact, expected[0], rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v = inputs(1, 5, 5)
    mask = torch.tensor([[False, False, True, True, True]])
    for op in (compact_attention, compact_attention_reference):
        y = op(q, k, v, QK, V, mask, 0.3, 1, True)
        assert bool((y[:, :2] == 0).all()) and bool((y[:, 2:] != 0).any(-1).all())


def test_large_logits():
    q, k, v = inputs(1, 20, 300, size=1e4)
    assert_close(compact_attention(q, k, v, QK, V, None, 1.0), *naive(q, k, v, QK, V, None, 1.0))


@pytest.mark.parametrize("batch,queries,keys,qk,v", [
    (0, 5, 5, QK, V), (2, 0, 5, QK, V), (2, 5, 0, QK, V), (2, 5, 5, (0,), (0,)), (2, 5, 5, (0, 4), (0, 0)),
])  # fmt: skip
def test_nothing_there(batch, queries, keys, qk, v):
    y = compact_attention(*inputs(batch, queries, keys, qk, v), qk, v)
    assert y.shape == (batch, queries, v[-1]) and bool((y == 0).all())


def test_strided_inputs():
    q, k, v = inputs(2, 33, 33)
    mask = mask_of("padding", 2, 33)
    want = naive(q, k, v, QK, V, mask, 0.3)
    fused = torch.cat([q, k, v], -1).split([QK[-1], QK[-1], V[-1]], -1)
    assert_close(compact_attention(*fused, QK, V, mask, 0.3), *want)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    assert_close(compact_attention(*turned, QK, V, mask, 0.3), *want)
    channels_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    columns_first = mask.t().contiguous().t()
    assert_close(compact_attention(*channels_first, QK, V, columns_first, 0.3), *want)
    negative = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (q, k, v)]
    assert negative[0].is_neg()
    assert_close(compact_attention(*negative, QK, V, mask, 0.3), *want)
    one = mask[:1].expand(2, -1)  # stride 0
    assert_close(compact_attention(q, k, v, QK, V, one, 0.3), *naive(q, k, v, QK, V, one, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_fp32(dtype):
    q, k, v = (t.to(dtype) for t in inputs(2, 9, 9))
    y = compact_attention(q, k, v, QK, V, mask_of("padding", 2, 9), 0.3)
    assert y.dtype == dtype
    want = naive(q.float(), k.float(), v.float(), QK, V, mask_of("padding", 2, 9), 0.3)[0]
    torch.testing.assert_close(y.double(), want, rtol=2.0**-8 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-6)


@native
def test_threads_give_the_same_bits():
    q, k, v = inputs(2, 60, 60)
    want = compact_attention(q, k, v, QK, V, None, 0.3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(compact_attention(q, k, v, QK, V, None, 0.3), want)
    finally:
        torch.set_num_threads(before)


# --- gradients and tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "padding", "nothing"])
def test_gradcheck(kind):
    qk, v_first = (0, 3, 3, 4), (0, 2, 4, 5)
    tensors = [t.requires_grad_() for t in inputs(2, 3, 4, qk, v_first, torch.float64)]
    mask = mask_of(kind, 2, 4)
    torch.autograd.gradcheck(lambda *t: compact_attention(*t, qk, v_first, mask, 0.7), tensors)


@pytest.mark.parametrize("kind", ["none", "padding"])
def test_gradcheck_of_grouped_and_causal(kind):
    qk, v_first = (0, 3, 3, 4), (0, 2, 4, 5)
    tensors = [t.requires_grad_() for t in inputs(2, 3, 4, qk, v_first, torch.float64, shared_by=2)]
    mask = mask_of(kind, 2, 4)
    torch.autograd.gradcheck(lambda *t: compact_attention(*t, qk, v_first, mask, 0.7, 2, True), tensors)


def test_fp32_gradients_are_the_references():
    tensors = inputs(2, 9, 9)
    mask, grads = mask_of("padding", 2, 9), []
    for op in (compact_attention, compact_attention_reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        op(*leaves, QK, V, mask, 0.3).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, want in zip(*grads, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, kind, grad):
    tensors = [t.requires_grad_(grad) for t in inputs(2, 5, 5, dtype=dtype)]
    torch.library.opcheck(
        torch.ops.prunekern.compact_attention.default, (*tensors, list(QK), list(V), mask_of(kind, 2, 5), 0.3)
    )


def test_opcheck_of_grouped_and_causal():
    tensors = [t.requires_grad_() for t in inputs(2, 5, 7, shared_by=2)]
    op = torch.ops.prunekern.compact_attention.default
    torch.library.opcheck(op, (*tensors, list(QK), list(V), mask_of("padding", 2, 7), 0.3, 2, True))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rest", [(1, False), (2, True)])
def test_compiles_into_one_graph(grad, rest):
    tensors = [t.requires_grad_(grad) for t in inputs(2, 9, 9, shared_by=rest[0])]
    mask = mask_of("padding", 2, 9)

    def f(q, k, v, mask):
        return compact_attention(q * 2, k, v, QK, V, mask, 0.3, *rest) + 1

    torch.compiler.reset()
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*tensors, mask)
    torch.testing.assert_close(got, f(*tensors, mask))
    if grad:
        ours = torch.autograd.grad(got.square().sum(), tensors)
        want = torch.autograd.grad(f(*tensors, mask).square().sum(), tensors)
        for a, b in zip(ours, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_under_autocast_it_stays_fp32():
    q, k, v = inputs(1, 9, 9)
    want = compact_attention(q, k, v, QK, V)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compact_attention(q, k, v, QK, V), want)
        assert compact_attention_reference(q, k, v, QK, V).dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"q": torch.zeros(5, 72)}, ValueError, "q must have shape [*, *, *] (got [5, 72])"),
        ({"k": torch.zeros(2, 5, 71)}, ValueError, "k must have shape [2, *, 72] (got [2, 5, 71])"),
        ({"v": torch.zeros(2, 4, 85)}, ValueError, "v must have shape [2, 5, *] (got [2, 4, 85])"),
        ({"q": torch.zeros(2, 5, 72, dtype=torch.int64)}, TypeError, "q must be float64, float32, bfloat16 or float16"),
        ({"v": torch.zeros(2, 5, 85).double()}, TypeError, "v must be torch.float32 like q (got torch.float64)"),
        ({"v": torch.zeros(2, 5, 85, device="meta")}, ValueError, "v is on meta, q on cpu"),
        ({"qk_first": (0, 72)}, ValueError, "v_first must have 2 entries like qk_first, heads + 1 (got 6)"),
        ({"qk_first": (), "v_first": ()}, ValueError, "qk_first must ascend from 0 to 72"),
        ({"qk_first": (1, 20, 20, 21, 24, 72)}, ValueError, "qk_first must ascend from 0 to 72, the channels there"),
        ({"qk_first": (0, 20, 19, 21, 24, 72)}, ValueError, "qk_first must "),
        ({"v_first": (0, 3, 51, 52, 52, 84)}, ValueError, "v_first must ascend from 0 to 85"),
        ({"shared_by": 0}, ValueError, "shared_by must be at least 1 (got 0)"),
        ({"shared_by": 5}, ValueError, "q must have a multiple of shared_by, 5, channels (got 72)"),
        ({"shared_by": 2}, ValueError, "k must have shape [2, *, 36] (got [2, 5, 72])"),
        ({"q": torch.zeros(2, 6, 72), "causal": True}, ValueError, "causal needs as many keys as queries at least"),
        ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool (got torch.float32)"),
        ({"key_mask": torch.ones(2, 4).bool()}, ValueError, "key_mask must have shape [2, 5] (got [2, 4])"),
    ],
)
def test_refusals(change, error, text):
    q, k, v = inputs(2, 5, 5)
    args = {"q": q, "k": k, "v": v, "qk_first": QK, "v_first": V, "key_mask": None} | change
    with pytest.raises(error, match=re.escape(f"compact_attention: {text}")):
        compact_attention(**args)


@native
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("keys", [5, 16, 70])
def test_logits_of_minus_infinity_weigh_alike(queries, keys):
    """All of them: the mean of the keys that are there, whatever the vector's width."""
    q, k, v = inputs(2, queries, keys, (0, 8), (0, 12))
    q[..., 0], k[..., 0] = float("inf"), float("-inf")
    y = compact_attention(q, k, v, (0, 8), (0, 12), None, 1.0)
    torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(y), rtol=1e-5, atol=1e-5)
