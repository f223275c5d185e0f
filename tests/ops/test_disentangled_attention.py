"""disentangled_attention against its definition in float64, written out pair by pair."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunekern import _native
from prunekern.ops.disentangled_attention import disentangled_attention, disentangled_attention_reference

QK, V = (0, 7, 7, 8, 20), (0, 3, 11, 11, 44)  # a head without queries, one without values
SMALL = ((0, 0, 2), (0, 1, 2))  # for derivatives: the same edges
TERMS = ((True, True), (True, False), (False, True), (False, False))


def arguments(batch=2, tokens=9, key=True, query=True, mask=True, dtype=torch.float32, seed=0, firsts=(QK, V)):
    g = torch.Generator().manual_seed(seed)
    qk, values = firsts[0][-1], firsts[1][-1]
    qkv = torch.randn(batch, tokens, 2 * qk + values, generator=g)
    q, k, v = qkv.to(dtype).split((qk, qk, values), -1)  # strided, as a block hands them over
    key, query = (
        torch.randn(max(2 * tokens - 1, 0), qk, generator=g).to(dtype) if there else None for there in (key, query)
    )
    allowed = None
    if mask:
        allowed = torch.rand(batch, tokens, generator=g) < 0.7
    return q, k, v, *firsts, key, query, allowed, 0.3


def definition(q, k, v, qk_first, v_first, key, query, mask, scale):
    """Float64; the row of positions of each pair is computed for itself."""
    q, k, v = q.double(), k.double(), v.double()
    batch, tokens = q.shape[:2]
    y = torch.zeros(batch, tokens, v.shape[2], dtype=torch.float64)
    for h in range(len(qk_first) - 1):
        a, b = slice(qk_first[h], qk_first[h + 1]), slice(v_first[h], v_first[h + 1])
        logits = torch.einsum("bic,bjc->bij", q[..., a], k[..., a])
        for i in range(tokens):
            rows = [tokens - 1 + i - j for j in range(tokens)]
            if key is not None:
                logits[:, i] += torch.einsum("bc,jc->bj", q[:, i, a], key[rows][:, a].double())
            if query is not None:
                logits[:, i] += torch.einsum("bjc,jc->bj", k[..., a], query[rows][:, a].double())
        logits *= scale
        if mask is not None:
            logits = torch.where(mask[:, None] & mask[:, :, None], logits, -torch.inf)
        weights = logits.softmax(-1)
        if mask is not None:
            weights = torch.where(mask[:, :, None], weights, 1 / tokens)
        y[..., b] = weights @ v[..., b]
    return y


def bound(args, want):
    """Logits are sums of at most 3 x 12 products: off by 40 rounding steps of their largest, here under 30."""
    return 4 * 40 * 30 * 2.0**-24 * float(args[2].abs().max())


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("tokens", (1, 2, 5, 33, 129))
def test_equals_the_definition(tokens, terms):
    for mask in (False, True):
        args = arguments(2, tokens, *terms, mask, seed=tokens)
        want = definition(*args)
        assert float((disentangled_attention(*args).double() - want).abs().max()) <= bound(args, want)
        wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        assert float((disentangled_attention(*wide) - want).abs().max()) <= 1e-12
        assert float((disentangled_attention_reference(*wide) - want).abs().max()) <= 1e-12


def test_runs_in_the_core(monkeypatch):
    assert _native.available(), _native.why_not()
    own = sys.modules["prunekern.ops.disentangled_attention"]
    assert own._EAGER is not None
    monkeypatch.setattr(own, "disentangled_attention_reference", None)  # whoever calls it fails
    args = arguments()
    want = disentangled_attention(*args)
    assert torch.equal(torch.ops.prunekern.disentangled_attention(*args), want)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(t, torch.Tensor) else t for t in args]
    assert torch.equal(disentangled_attention(*turned), want)  # the positions' channels are strided: copied
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        low = arguments(dtype=dtype)
        got = disentangled_attention(*low)
        assert got.dtype == dtype and torch.allclose(got.double(), definition(*low), rtol=tolerance, atol=tolerance)
    assert torch.allclose(disentangled_attention(*args, arithmetic="bf16"), want, rtol=0.1, atol=0.1)


def test_nothing_to_do():
    for batch, tokens in ((0, 4), (2, 0)):
        assert disentangled_attention(*arguments(batch, tokens)).shape == (batch, tokens, V[-1])
    q = torch.randn(2, 3, 0)
    assert disentangled_attention(q, q, q, (0,), (0,)).shape == (2, 3, 0)
    v = torch.randn(2, 3, 4)
    y = disentangled_attention(q, q, v, (0, 0), (0, 4), torch.randn(5, 0), torch.randn(5, 0))
    torch.testing.assert_close(y, v.mean(1, keepdim=True).expand_as(v))


def test_nothing_but_padding_averages_all_values():
    args = list(arguments(mask=False))
    args[7] = torch.zeros(2, 9, dtype=torch.bool)
    torch.testing.assert_close(disentangled_attention(*args), args[2].mean(1, keepdim=True).expand_as(args[2]))


@pytest.mark.parametrize("terms", TERMS)
def test_gradients(terms):
    args = list(arguments(1, 3, *terms, dtype=torch.float64, firsts=SMALL))
    args[7][0, 0] = True
    at = [i for i in (0, 1, 2, 5, 6) if args[i] is not None]
    leaves = [args[i].detach().clone().requires_grad_() for i in at]

    def run(*given):
        full = list(args)
        for i, tensor in zip(at, given, strict=True):
            full[i] = tensor
        return disentangled_attention(*full)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_opcheck():
    for terms, needs_grad in (((True, True), True), ((False, False), False)):
        args = [
            t.clone().requires_grad_(needs_grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in arguments(1, 4, *terms, firsts=SMALL)
        ]
        torch.library.opcheck(torch.ops.prunekern.disentangled_attention.default, tuple(args))


def test_compiled_and_transformed():
    args = arguments()
    want = disentangled_attention(*args)
    torch.compiler.reset()
    got = torch.compile(lambda q: disentangled_attention(q, *args[1:]), fullgraph=True, backend="aot_eager")(args[0])
    torch.testing.assert_close(got, want)
    mapped = torch.func.vmap(lambda q: disentangled_attention(q, *args[1:]))(torch.stack([args[0], 2 * args[0]]))
    torch.testing.assert_close(mapped[0], want)


def test_flops():
    for (key, query), count in zip(TERMS, (3, 2, 2, 1), strict=True):
        with FlopCounterMode(display=False) as counter:
            disentangled_attention(*arguments(2, 9, key, query))
        assert counter.get_total_flops() == 2 * 2 * 9 * 9 * (count * QK[-1] + V[-1])


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({0: None}, TypeError, "q must be a torch.Tensor"),
        ({5: torch.zeros(16, 20)}, ValueError, r"pos_key must have shape \[17, 20\] \(got \[16, 20\]\)"),
        ({6: torch.zeros(17, 19)}, ValueError, r"pos_query must have shape \[17, 20\] \(got \[17, 19\]\)"),
        ({6: torch.zeros(17, 20).double()}, TypeError, "pos_query must be torch.float32 like q"),
        ({1: torch.zeros(2, 8, 20)}, ValueError, "k must have shape"),
        ({2: torch.zeros(2, 8, 44)}, ValueError, "v must have shape"),
        ({3: (0, 7, 7, 8, 21)}, ValueError, "qk_first must ascend from 0 to 20"),
        ({4: (0, 3, 44)}, ValueError, "v_first must have 5 entries like qk_first"),
        ({7: torch.zeros(2, 9)}, TypeError, "token_mask must be bool"),
        ({7: torch.zeros(2, 8, dtype=torch.bool)}, ValueError, "token_mask must have shape"),
        ({8: float("nan")}, ValueError, "scale must be finite"),
        ({9: "int3"}, ValueError, "arithmetic must be fp32 or bf16"),
    ],
)
def test_refusals(change, error, message):
    args = [*arguments(), "fp32"]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error, match=f"disentangled_attention: {message}"):
        disentangled_attention(*args)
