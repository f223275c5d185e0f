"""compact_attention with a window: numbers against float64, gradients, tracing, and what it refuses."""

import pytest
import torch

from prunekern.ops import compact_attention
from prunekern.ops.compact_attention import compact_attention_reference
from tests.ops.test_compact_attention import QK, V, assert_close, inputs, mask_of, naive


def near(q, k, v, mask, window):
    """One query at a time, as a call without a window on the keys that are near it."""
    parts = []
    for t in range(q.shape[1]):
        own = slice(max(t - window, 0), t + window + 1)
        some = None if mask is None else mask[:, own]
        parts.append(naive(q[:, t : t + 1], k[:, own], v[:, own], QK, V, some, 0.3))
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("kind", ["none", "padding", "holes", "nothing"])
@pytest.mark.parametrize("tokens,window", [(1, 0), (5, 1), (70, 33), (129, 4), (9, 100)])
def test_against_float64(tokens, window, kind):
    q, k, v = inputs(2, tokens, tokens)
    mask = mask_of(kind, 2, tokens)
    if mask is not None:  # what nobody may read
        k[~mask], v[~mask] = float("nan"), float("nan")
    expected, rest = near(q, k, v, mask, window), (mask, 0.3, 1, False, "fp32", window)
    assert_close(compact_attention(q, k, v, QK, V, *rest), *expected)
    assert_close(compact_attention(q, k, v, list(QK), list(V), *rest), *expected)  # not the short way
    assert_close(compact_attention_reference(q, k, v, QK, V, mask, 0.3, window=window), *expected)
    exact = compact_attention(q.double(), k.double(), v.double(), QK, V, *rest)
    torch.testing.assert_close(exact, expected[0], rtol=1e-12, atol=1e-12)


def test_gradients_and_opcheck():
    qk, first = (0, 4, 4, 7), (0, 2, 5, 6)
    q, k, v = (t.requires_grad_() for t in inputs(2, 6, 6, qk, first, torch.float64))
    mask = mask_of("padding", 2, 6)
    rest = (qk, first, mask, 0.4, 1, False, "fp32", 2)
    assert torch.autograd.gradcheck(lambda *x: compact_attention(*x, *rest), (q, k, v))
    torch.library.opcheck(torch.ops.prunekern.compact_attention, (q, k, v, *rest))
    compiled = torch.compile(lambda *x: compact_attention(*x, *rest), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), compact_attention(q, k, v, *rest))


@pytest.mark.parametrize(
    "keys,causal,window,text",
    [
        (5, False, -1, "window must not be negative .got -1"),
        (7, False, 2, "a window needs as many keys as queries, and causal False .got 7, 5, False"),
        (5, True, 2, "a window needs as many keys as queries, and causal False .got 5, 5, True"),
    ],
)
def test_refusals(keys, causal, window, text):
    q, k, v = inputs(2, 5, keys)
    for cast in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=text):
            compact_attention(q.to(cast), k.to(cast), v.to(cast), QK, V, None, 0.3, 1, causal, "fp32", window)
