"""Compact decoders at their edges: heads, pairs and layers gone, any masks; the table of groups; what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prunekern as pk
from prunekern.nn import CompactLinear
from tests.helpers.decoder_checks import check, generated
from tests.helpers.equal_models import F64
from tests.helpers.tiny_decoders import FAMILIES, FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, batch, build, names
from tests.helpers.tiny_models import attached, keep_only, prune

PAIRS = HEAD_DIM // 2


def test_head_without_values_vanishes_with_its_queries():
    model = build(dtype=torch.float64)
    v = names()["v"]
    keep_only(attached(model), {v: np.arange(KV_HEADS * HEAD_DIM) >= HEAD_DIM})
    small = check(model, batch(3), F64)
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (HEADS // KV_HEADS * HEAD_DIM, HIDDEN)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (HEAD_DIM, HIDDEN)
    assert attention.o_proj.weight.shape == (HIDDEN, HEADS // KV_HEADS * HEAD_DIM)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", ["v", "q", "up", "o", "down"])
def test_whole_masks_gone(family, gone):
    """No values: the layer's attention is o's bias. No pairs: heads average. Generation goes on in every case."""
    model = build(family, dtype=torch.float64)
    pruner = attached(model)
    if family == "qwen3" and gone == "q":
        assert names()["q"] not in pruner.masks
        return
    for layer in range(LAYERS):
        name = names(layer)[gone]
        keep_only(pruner, {name: np.zeros(pruner.masks[name].logits.numel(), bool)})
        small = check(model, batch(3), F64)
        assert torch.equal(generated(small, batch(2), 8), generated(model, batch(2), 8))


def test_generation_that_needs_removed_heads_is_refused():
    """Weights of the heads left are given; where a block has none, the tuple would be one short and shifted."""
    model = build(attention="eager", dtype=torch.float64)
    pruner = attached(model)
    keep_only(pruner, {names(1)["v"]: np.arange(KV_HEADS * HEAD_DIM) >= HEAD_DIM})
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    small = pk.compact(model)
    weights = small.generate(**batch(1), **asked).attentions[0]
    assert [w.shape[1] for w in weights] == [HEADS, HEADS // KV_HEADS]
    keep_only(pruner, {names(1)["v"]: np.zeros(KV_HEADS * HEAD_DIM, bool)})
    small = pk.compact(model)
    with pytest.raises(ValueError, match=r"output_attentions must be False \(got True\): block 1 .* no attention head"):
        small.generate(**batch(1), **asked)
    small.generation_config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False"):
        small.generate(**batch(1), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        assert small(**batch(1)).logits.isfinite().all()


def test_qwen3_keeps_queries_and_keys():
    model = build("qwen3")
    pruner = prune(attached(model), 0.9, seed=1)
    kinds = {g.kind for g in pruner.table.groups.values()}
    assert kinds == {"value", "ffn", "residual"}
    attention = pk.compact(model).model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (HEADS * HEAD_DIM, HIDDEN)
    assert attention.k_proj.weight.shape == (KV_HEADS * HEAD_DIM, HIDDEN)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_masks(data):
    model = build(dtype=torch.float64, layers=1, seed=data.draw(st.integers(0, 3)))
    pruner = attached(model)
    kept = {}
    for name, mask in pruner.masks.items():
        share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        kept[name] = rng.random(mask.logits.numel()) >= share
    keep_only(pruner, kept)
    check(model, batch(2, 6), F64)


# -- the table -------------------------------------------------------------------------------------------------


def test_groups_of_a_block_by_hand():
    """Pair 1 of key/value head 1: k rows 13 and 19; the same in query heads 3, 4 and 5."""
    pruner = attached(build())
    n, table = names(), pruner.table
    query = table.groups[n["q"]]
    index = PAIRS + 1
    assert sorted(query.rows[index].tolist()) == [h * HEAD_DIM + j for h in (3, 4, 5) for j in (1, 7)]
    assert query.removed_rows[n["k"]][index].tolist() == [13, 19]
    assert int(query.head[index]) == 1 and query.lives_by == n["v"]
    value = table.groups[n["v"]]
    assert value.rows[14].tolist() == [14]
    assert value.removed_cols[n["o"]][14].tolist() == [38, 50, 62]
    ffn = table.groups[n["up"]]
    assert ffn.removed_rows[n["gate"]].tolist() == ffn.removed_cols[n["down"]].tolist() == [[i] for i in range(FFN)]


@pytest.mark.parametrize("align", (1, 4))
@pytest.mark.parametrize("share", (0.2, 0.5))
def test_budget_is_met(share, align):
    model = build()
    pruner = attached(model, sparsity=share, align=align)
    pruner.finalize()
    plan = pk.plan(model)
    assert share <= plan.sparsity() < share + 0.02 * align
    small = pk.compact(model)
    held = sum(p.numel() for m in small.modules() if isinstance(m, CompactLinear) for p in m.parameters())
    assert held == plan.params()


# -- bad input -------------------------------------------------------------------------------------------------


def test_rotary_types_without_a_rule_are_refused():
    model = build()
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type must be one of default, linear.*got 'spiral'"):
        pk.attach(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor 0.5"):
        pk.attach(model)


def test_split_groups_are_refused():
    """A plan edited by hand that drops half of a pair, in one query head of three."""
    from prunekern.compacting.plan import LayerPlan, Plan, check

    model = build()
    pruner = keep_only(attached(model), {})
    plan = pruner.plan()
    q = plan.layers[names()["q"]]
    rows = q.rows[q.rows != 2]
    edited = Plan(plan.layers | {names()["q"]: LayerPlan(rows, q.cols, q.out_features, q.in_features, q.bias)})
    with pytest.raises(
        ValueError, match=r"split a channel group: row 8 is kept, row 2 is not \(rows \[2, 8, 14, 20, 26, 32\]"
    ):
        check(edited, pruner.table)
