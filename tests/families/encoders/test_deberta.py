"""Compact DeBERTa equals the masked one, and both a stock model whose weights are merged by the definition."""

import numpy as np
import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern import _native, families
from prunekern.compacting.checkpoint import set_weights
from prunekern.nn import CompactLinear
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_deberta import CLASSES, VARIANTS, batch, build, compact, names, watch_ragged
from tests.helpers.tiny_models import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    attached,
    difference,
    keep_only,
    logits,
    prune,
)

SHARED = [v for v in VARIANTS if not v.endswith("of positions")]  # the projections of content are those of positions


@pytest.fixture
def ragged(monkeypatch):
    return watch_ragged(monkeypatch)


# -- the core promise ------------------------------------------------------------------------------------------


OTHERS = [variant for variant in VARIANTS if variant != "v3"]


@pytest.mark.parametrize(
    "variant,share", [*(("v3", share) for share in (0.0, 0.3, 0.97, 1.0)), *((variant, 0.4) for variant in OTHERS)]
)
def test_compact_equals_masked(variant, share):
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build(variant, "token", dtype)
        prune(attached(model), share, seed=1)
        small = pk.compact(model)
        # 17 tokens are more than the 8 buckets tell apart, 33 more than there are positions.
        for size, length in ((1, 1), (4, 9), (3, 17), (2, 33)):
            if length <= 20 or small.config.relative_attention and not small.config.position_biased_input:
                check(model, batch(size, length, padded=size > 1), tolerance, small)


@pytest.mark.parametrize("task,legacy", [*((task, True) for task in CLASSES), ("masked_lm", False)])
def test_every_head(task, legacy):
    model = build("v3", task, legacy=legacy)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    assert type(small) is type(model)
    inputs = batch(task=task)
    with torch.no_grad():
        got, want = small(**inputs).to_tuple(), model(**inputs).to_tuple()
    assert len(got) == len(want) == (2 if task == "question" else 1)
    assert all(difference(a, b) <= F32 for a, b in zip(got, want, strict=True))


def only(*heads, width=HEAD_DIM):
    kept = np.zeros((HEADS, HEAD_DIM), bool)
    for h in heads:
        kept[h, :width] = True
    return kept.ravel()


NONE = np.zeros(HIDDEN, bool)
EDGES = {
    "head vanished": {"v": only(0, 2)},
    "head without query and key": {"q": only(0, 2)},
    "no query and key in the layer": {"q": NONE},
    "one query channel a head": {"q": only(*range(HEADS), width=1)},
    "value wider than query": {"q": only(0, 1, 3, width=2), "v": only(0, 3)},
    "o without input": {"v": NONE},
    "FFN empty": {"up": np.zeros(FFN, bool)},
    "whole layer gone": {"q": NONE, "v": NONE, "o": NONE, "up": np.zeros(FFN, bool), "down": NONE},
}


@pytest.mark.parametrize(
    "variant,edge",
    [*(("v3", e) for e in EDGES), *((v, "head without query and key") for v in ("p2c", "keys of positions", "plain"))],
)
def test_edge(variant, edge):
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build(variant, "token", dtype)
        keep_only(attached(model), {names(1, "token")[part]: kept for part, kept in EDGES[edge].items()})
        small = pk.compact(model)
        for inputs in (batch(1, padded=False), batch(5)):
            check(model, inputs, tolerance, small)


def test_shapes_that_are_left():
    model = build("v3")
    n = names(1)
    keep_only(attached(model), {n["v"]: only(0, 2), n["q"]: only(0, 1, width=5)})
    small = pk.compact(model)
    shape = {part: tuple(small.get_submodule(name).weight.shape) for part, name in n.items()}
    assert shape["q"] == shape["k"] == (5, HIDDEN)  # head 1 has no values, heads 2 and 3 no queries
    assert shape["v"] == (2 * HEAD_DIM, HIDDEN) and shape["o"] == (HIDDEN, 2 * HEAD_DIM)


def test_positions_of_their_own_are_cut_with_their_partners():
    for variant, carrier, position in (
        ("keys of positions", "q", "pos_key_proj"), ("queries of positions", "k", "pos_query_proj"),
    ):  # fmt: skip
        model = build(variant, dtype=torch.float64)
        name = names(0)[carrier]
        pruner = attached(model)
        assert name in pruner.masks
        keep_only(pruner, {name: only(0, 1, 2, width=3)})
        small = pk.compact(model)
        attention = small.deberta.encoder.layer[0].attention.self
        assert len(getattr(attention, position).weight) == len(attention.key_proj.weight) == 9
        check(model, batch(), F64, small)


@pytest.mark.parametrize("variant", ("v3", "queries of positions"))
def test_queries_and_values_alone(variant):
    model = build(variant, dtype=torch.float64)
    prune(attached(model, preset="paper"), 0.5)
    small = check(model, batch(), F64)
    assert small.get_submodule(names()["up"]).weight.shape == (FFN, HIDDEN)


def test_what_no_channel_group_can_express():
    model = build("v3", share_att_key=False)
    with pytest.raises(ValueError, match=r"config.share_att_key must be True .* c2p and p2c \(got False\)"):
        pk.attach(model)
    with pytest.raises(ValueError, match="activation must be zero at zero"):
        pk.attach(build("v3", hidden_act="sigmoid"))
    assert families.most_tokens(build("v3")) is None and families.most_tokens(build("plain")) == 20


# -- what runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SHARED)
def test_fp32_runs_on_ragged_heads(variant, ragged):
    assert _native.available(), _native.why_not()
    small = compact(variant)
    for padded in (True, False):
        logits(small, batch(padded=padded))
    assert len(ragged) == 2 * LAYERS
    assert all((args[7] is None) == (i >= LAYERS) for i, args in enumerate(ragged))  # a mask where there is padding


def test_what_takes_padded_heads(ragged):
    small, inputs = compact(), batch()
    want = logits(small, inputs)
    assert len(ragged) == LAYERS
    ragged.clear()

    with torch.no_grad():
        out = small(**inputs, output_attentions=True, output_hidden_states=True)
    assert difference(out.logits, want) <= F32 and len(out.hidden_states) == 1 + LAYERS
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))

    small.requires_grad_(True)
    out = small(**inputs).logits
    assert difference(out.detach(), want) <= F32 and out.requires_grad
    out.sum().backward()
    assert float(small.deberta.encoder.rel_embeddings.weight.grad.abs().max()) > 0
    small.requires_grad_(False)

    keys = inputs | {"attention_mask": inputs["attention_mask"][:, None, None]}  # of keys alone
    assert small(**keys).logits.shape == want.shape

    heard = []
    for name, module in small.named_modules():
        if isinstance(module, CompactLinear):
            module.register_forward_hook(lambda m, a, y, name=name: heard.append((name, a[0].shape[:-1])))
    assert difference(logits(small, inputs), want) <= F32
    # Queries and keys are made of positions and of content, which comes last.
    assert len(heard) == 8 * LAYERS and not ragged
    assert [shape for name, shape in heard if name == names(0)["q"]] == [(1, 16), (4, 9)]


@pytest.mark.parametrize("variant", ("v3", "no buckets"))
def test_queries_and_positions_from_elsewhere(variant):
    """What an enhanced mask decoder asks for: a layer with queries, or relative positions, of its own."""
    model = build(variant, dtype=torch.float64)
    prune(attached(model), 0.4)
    small = pk.compact(model)
    g = torch.Generator().manual_seed(3)
    x, query = torch.randn(2, 2, 7, HIDDEN, generator=g, dtype=torch.float64)
    mask, positions = torch.ones(2, 7), torch.randint(-6, 7, (1, 7, 7), generator=g)
    for given in ({"query_states": query}, {"relative_pos": positions}, {}):
        with torch.no_grad():
            got, want = (m.deberta.encoder(x, mask, **given).last_hidden_state for m in (small, model))
        assert difference(got, want) <= F64


def test_dropout_is_not_passed_over(ragged):
    small = compact()
    want = logits(small, batch())
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    small.train()
    ragged.clear()
    assert difference(logits(small, batch()), want) > 1e-3 and not ragged
    assert torch.equal(logits(small.eval(), batch()), want)


def test_compiled_whole():
    small = compact()
    inputs = batch()
    want = logits(small, inputs)
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(small, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert difference(got, want) <= F32


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        model = build()
        attached(model, dropout=0.1).step()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 40
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_shrunk_in_training():
    model = build(dtype=torch.float64)
    pruner = attached(model, sparsity=0.4)
    pruner.step()
    pruner.finalize()
    model.eval()
    want = logits(model, batch())
    pruner.shrink()
    assert difference(logits(model, batch()), want) <= F64
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert difference(logits(pk.compact(model.eval()), batch()), want) <= F64


@pytest.mark.parametrize("kind,tolerance", [("bf16", 0.05), ("int8", 0.1)])
def test_fewer_bits(kind, tolerance, ragged):
    small, inputs = compact(share=0.3), batch()
    want = logits(small, inputs)
    set_weights(small, kind)
    got = logits(small, inputs)
    assert len(ragged) == 2 * LAYERS and 0 < difference(got, want) <= tolerance
    with torch.no_grad():  # by padded heads: the same weights
        assert difference(small(**inputs, output_attentions=True).logits, got) <= tolerance
