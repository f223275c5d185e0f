"""Encoders with whole heads, layers and parts gone: named edges of the equality, and the shapes they leave."""

import itertools

import pytest
import torch

import prunekern as pk
from tests.helpers.encoder_edges import EDGES, HEADS_0_2, NONE, head, only
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_models import (
    FAMILIES,
    FFN,
    HEADS,
    HIDDEN,
    attached,
    batch,
    build,
    difference,
    keep_only,
    logits,
    names,
    prune,
)


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("family,attention", [*itertools.product(FAMILIES, ["sdpa", "eager"])])
def test_edge(family, attention, edge):
    n = names(family, 1)
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build(family, "token", attention, dtype)
        pruner = attached(model)
        keep_only(pruner, {n[part]: kept for part, kept in EDGES[edge].items()})
        small = pk.compact(model)
        for inputs in (batch(1, padded=False), batch(8)):
            check(model, inputs, tolerance, small)


def shapes(model, n):
    return {part: tuple(model.get_submodule(name).weight.shape) for part, name in n.items()}


def compacted(family, edge):
    n = names(family, 1)
    model = build(family, "token", dtype=torch.float64)
    keep_only(attached(model), {n[part]: kept for part, kept in EDGES[edge].items()})
    return model, pk.compact(model), n


@pytest.mark.parametrize("family", FAMILIES)
def test_vanished_head_takes_its_queries_and_keys_along(family):
    _, small, n = compacted(family, "head vanished")
    wide, half = (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN)
    want = {"q": half, "k": half, "v": half, "o": (HIDDEN, HIDDEN // 2), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
    assert shapes(small, n) == want
    assert shapes(small, names(family, 0))["q"] == wide


def record(model, **modules):
    """A dict that fills with the inputs ("v in") and outputs ("v out") of these modules at the next forward."""
    seen = {}

    def hook(tag):
        return lambda m, args, out: seen.update({f"{tag} in": args[0], f"{tag} out": out})

    for tag, name in modules.items():
        model.get_submodule(name).register_forward_hook(hook(tag))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_head_without_queries_averages_the_allowed_values(family):
    """Written out: attention weights 1 / (allowed keys), padding excluded."""
    for attention in ("sdpa", "eager"):
        n = names(family, 0)
        model = build(family, "token", attention, torch.float64, layers=1)
        keep_only(attached(model), {n["q"]: NONE})
        small = pk.compact(model)
        inputs = batch(4)
        seen = record(small, v=n["v"], o=n["o"])
        logits(small, inputs)
        allowed = inputs["attention_mask"].double()
        mean = torch.einsum("bt,btc->bc", allowed, seen["v out"]) / allowed.sum(1, keepdim=True)
        want = mean[:, None].expand_as(seen["o in"])
        torch.testing.assert_close(seen["o in"], want, rtol=1e-12, atol=1e-12)
        assert shapes(small, n)["q"] == shapes(small, n)["k"] == (0, HIDDEN)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_ffn_still_adds_the_bias_of_down(family):
    model, small, n = compacted(family, "FFN empty")
    assert shapes(small, n)["up"] == (0, HIDDEN) and shapes(small, n)["down"] == (HIDDEN, 0)
    before = logits(small, batch())
    with torch.no_grad():
        small.get_submodule(n["down"]).bias.add_(torch.randn(HIDDEN, dtype=torch.float64))
    assert difference(logits(small, batch()), before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_gone_is_two_layer_norms_not_the_identity(family):
    model, small, n = compacted(family, "whole layer gone")
    assert all(w == 0 for w in (small.get_submodule(name).weight.numel() for name in n.values()))
    hidden = small(**batch(), output_hidden_states=True).hidden_states
    block = small.get_submodule(n["q"].rpartition(".attention")[0])
    if family == "distilbert":
        norms = block.sa_layer_norm, block.output_layer_norm
    else:
        norms = block.attention.output.LayerNorm, block.output.LayerNorm
    with torch.no_grad():
        torch.testing.assert_close(norms[1](norms[0](hidden[1])), hidden[2], rtol=1e-12, atol=1e-12)
    assert difference(hidden[1], hidden[2]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_scale_is_that_of_the_dense_head(family):
    """One query channel a head: with the scale of a head one wide the weights would differ."""
    n = names(family, 0)
    model = build(family, "token", "eager", torch.float64, layers=1)
    keep_only(attached(model), {n["q"]: only(HIDDEN, *(head(h, 1) for h in range(HEADS)))})
    small = pk.compact(model)
    inputs = batch(2)
    want = model(**inputs, output_attentions=True).attentions[0]
    got = small(**inputs, output_attentions=True).attentions[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert float(got.std()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions(family):
    model = build(family, attention="eager", dtype=torch.float64)
    n = names(family, 1)
    keep_only(attached(model), {n["v"]: HEADS_0_2, n["q"]: only(HIDDEN, head(0, 3), head(2, 2))})
    small = pk.compact(model)
    inputs = batch()
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, want = small(**inputs, **kwargs), model(**inputs, **kwargs)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert difference(a, b) <= F64
    assert difference(got.attentions[0], want.attentions[0]) <= F64
    # Heads 1 and 3 are gone from the second layer: the weights of the two that are left, in order.
    assert got.attentions[1].shape[1] == 2
    assert difference(got.attentions[1], want.attentions[1][:, [0, 2]]) <= F64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", (0, 1))
def test_attentions_of_a_layer_without_heads(family, gone):
    model = build(family, attention="eager", dtype=torch.float64)
    keep_only(attached(model), {names(family, gone)["v"]: NONE})
    small = pk.compact(model)
    with torch.no_grad():
        out = small(**batch(), output_attentions=True)
    assert [a.shape[1] for a in out.attentions] == [HEADS * (layer != gone) for layer in (0, 1)]
    assert difference(out.logits, logits(model, batch())) <= F64


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_call_that_says_it_is_causal(family):
    """transformers' attention honours `is_causal` where no mask says more: so do ragged heads, by not running."""
    model = build(family, "base")
    prune(attached(model), 0.3)
    small, inputs = pk.compact(model), batch(2, padded=False)
    with torch.no_grad():
        want, got = (m(**inputs, is_causal=True).last_hidden_state for m in (model, small))
        assert difference(want, model(**inputs).last_hidden_state) > 0.1
    assert difference(got, want) < 1e-4
