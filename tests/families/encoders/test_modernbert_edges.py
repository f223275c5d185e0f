"""ModernBERT with whole heads, layers and parts gone: named edges of the equality, and what is left of them."""

import numpy as np
import pytest
import torch

import prunekern as pk
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_models import attached, difference, keep_only
from tests.helpers.tiny_modernbert import FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, batch, build, check, names, results

BOTH = ((torch.float64, F64), (torch.float32, F32))


def pairs(*ranges):
    """bool [HEADS * HEAD_DIM / 2]: (head, first pairs of it that stay)."""
    kept = np.zeros((HEADS, HEAD_DIM // 2), bool)
    for head, count in ranges:
        kept[head, :count] = True
    return kept.flatten()


def values(*ranges):
    kept = np.zeros((HEADS, HEAD_DIM), bool)
    for head, count in ranges:
        kept[head, :count] = True
    return kept.flatten()


NONE, NO_PAIR, NO_FFN = np.zeros(HIDDEN, bool), np.zeros(HIDDEN // 2, bool), np.zeros(FFN, bool)
EDGES = {
    "head vanished": {"v": values((0, 12), (2, 12))},
    "heads of unequal width": {"v": values((0, 3), (1, 7), (2, 12), (3, 1)), "q": pairs((0, 6), (1, 1), (3, 4))},
    "head without query and key": {"q": pairs((0, 6), (2, 3))},
    "no query and key in the layer": {"q": NO_PAIR},
    "one channel of each": {"q": pairs((1, 1)), "v": values((1, 1)), "up": np.arange(FFN) == FFN - 1},
    "o without input": {"v": NONE},
    "o without input and without rows": {"v": NONE, "o": NONE},
    "rows of o and down": {"o": np.arange(HIDDEN) % 3 == 0, "down": np.arange(HIDDEN) > 30},
    "FFN empty": {"up": NO_FFN},
    "whole layer gone": {"q": NO_PAIR, "v": NONE, "o": NONE, "up": NO_FFN, "down": NONE},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_edge(attention, edge):
    for layer, (dtype, tolerance) in zip((0, 1), BOTH, strict=True):
        model = build("token", attention, dtype)
        keep_only(attached(model), {names(layer)[part]: kept for part, kept in EDGES[edge].items()})
        check(model, (batch(1, padded=False), batch()), tolerance)


def test_a_layer_gone_is_the_identity():
    """Norms come before: nothing is left to be done to the residual."""
    model = build(dtype=torch.float64)
    keep_only(attached(model), {names(1)[part]: kept for part, kept in EDGES["whole layer gone"].items()})
    small = pk.compact(model)
    with torch.no_grad():
        hidden = small(**batch(), output_hidden_states=True).hidden_states
    assert len(hidden) == LAYERS + 1
    states = []
    small.model.layers[1].register_forward_hook(lambda m, args, out: states.extend((args[0], out)))
    results(small, batch())
    assert torch.equal(*states)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_head_without_queries_averages_what_is_near(attention):
    """Written out, in the local layer: the mean of the values of allowed keys within the window."""
    model, n = build("token", attention, torch.float64), names(1)
    keep_only(attached(model), {n["q"]: NO_PAIR})
    small = pk.compact(model)
    seen = {}
    for tag in "vo":
        small.get_submodule(n[tag]).register_forward_hook(
            lambda m, args, out, tag=tag: seen.update({tag: (args[0], out)})
        )
    inputs = batch(4)
    results(small, inputs)
    at = torch.arange(13)
    near = ((at[:, None] - at).abs() <= 4) & inputs["attention_mask"].bool()[:, None]  # [batch, queries, keys]
    weights = near.double() / near.sum(-1, keepdim=True)
    want = (weights @ seen["v"][1])[near.any(-1)]
    exact = 1e-12 if attention == "sdpa" else 1e-6  # transformers' eager softmax is in float32
    torch.testing.assert_close(seen["o"][0][near.any(-1)], want, rtol=exact, atol=exact)


def test_hidden_states_and_attentions():
    model = build(attention="eager", dtype=torch.float64)
    keep_only(attached(model), {names(1)["v"]: values((0, 12), (2, 5)), names(0)["q"]: pairs((0, 2), (1, 6))})
    small, kwargs = pk.compact(model), {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, want = small(**batch(), **kwargs), model(**batch(), **kwargs)
    assert len(got.hidden_states) == len(want.hidden_states) == LAYERS + 1
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert difference(a, b) <= F64
    assert difference(got.attentions[0], want.attentions[0]) <= F64
    assert difference(got.attentions[1], want.attentions[1][:, [0, 2]]) <= F64
