"""Plan: plain data both ways, every malformed one refused by name, none taken for another architecture."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekern as pk
from prunekern import families
from prunekern.compacting.plan import LayerPlan, Plan, check
from tests.helpers.tiny_models import FAMILIES, FFN, HEAD_DIM, HIDDEN, attached, build, keep_only, names, prune

LAYER = names("distilbert", 0)["q"]


def table(model):
    return families.of(model).table(model)


def pruned(family="distilbert", share=0.5, seed=0):
    model = build(family)
    prune(attached(model), share, seed)
    return model, pk.plan(model)


def as_json(plan):
    return json.loads(json.dumps(plan.to_dict()))


# -- what it says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_indices_are_those_of_the_masks(family):
    """Written out per layer: rows of the carrier, of its partner; columns of the layer that reads it."""
    model, plan = pruned(family, 0.4)
    kept = {c: m.kept() for c, m in pk.Pruner(model, pk.PruneConfig(), table(model)).masks.items()}
    for i in range(2):
        n = names(family, i)
        on = {part: kept[n[part]].nonzero().flatten() for part in ("q", "v", "o", "up", "down")}
        heads = {int(r) // HEAD_DIM for r in on["v"]}
        q = torch.tensor([int(r) for r in on["q"] if int(r) // HEAD_DIM in heads], dtype=torch.int64)
        whole, ffn = torch.arange(HIDDEN), torch.arange(FFN)
        assert ffn.numel() == FFN
        want = {"q": (q, whole), "k": (q, whole), "v": (on["v"], whole), "o": (on["o"], on["v"])}
        want |= {"up": (on["up"], whole), "down": (on["down"], on["up"])}
        for part, (rows, cols) in want.items():
            layer = plan.layers[n[part]]
            assert layer.rows.dtype == layer.cols.dtype == torch.int64
            assert torch.equal(layer.rows, rows) and torch.equal(layer.cols, cols), part
            assert layer.bias is True


def test_counts():
    layers = {
        "a": LayerPlan(torch.arange(3), torch.tensor([0, 4]), 5, 7, True),
        "b": LayerPlan(torch.arange(0), torch.arange(4), 6, 4, False),
    }
    plan = Plan(layers)
    assert plan.params() == 3 * 2 + 3 and plan.dense_params() == 5 * 7 + 5 + 24
    assert plan.macs() == 6 and plan.macs(10) == 60 and plan.dense_macs(2) == 2 * (35 + 24)
    assert plan.sparsity() == 1 - 9 / 64 and plan.sparsity("macs") == 1 - 6 / 59
    assert repr(plan) == "Plan(2 layers, 9 of 64 block parameters)"


def test_of_a_compact_model_is_what_was_kept():
    model, plan = pruned()
    assert pk.plan(pk.compact(model)) == plan


def test_of_a_model_never_attached():
    with pytest.raises(ValueError, match="plan: DistilBertForSequenceClassification has no masked layers; call"):
        pk.plan(build())


# -- plain data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_json(family, share):
    model, plan = pruned(family, share)
    back = Plan.from_dict(as_json(plan))
    assert back == plan and back.params() == plan.params() and back.macs(3) == plan.macs(3)
    for name, layer in plan.layers.items():
        assert torch.equal(back.layers[name].rows, layer.rows) and torch.equal(back.layers[name].cols, layer.cols)
        assert back.layers[name].rows.dtype == torch.int64
    assert as_json(back) == as_json(plan)
    check(back, table(model))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.data())
def test_bitmaps_of_any_size(size, data):
    kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    rows = torch.tensor(kept).nonzero().flatten()
    plan = Plan({"x": LayerPlan(rows, torch.arange(3), size, 3, False)})
    entry = as_json(plan)["layers"]["x"]
    back = Plan.from_dict(as_json(plan)).layers["x"]
    assert torch.equal(back.rows, rows) and back.cols.tolist() == [0, 1, 2]
    # The documented layout: bit i of byte i // 8, lowest first.
    if entry["rows"] != "all":
        data = bytes.fromhex(entry["rows"])
        assert [bool(data[i // 8] >> (i % 8) & 1) for i in range(size)] == kept


def test_equality():
    _, plan = pruned(seed=0)
    assert plan == pruned(seed=0)[1] and plan != pruned(seed=1)[1]
    assert plan != plan.to_dict() and (plan == 3) is False


def test_size_of_the_data():
    """A bitmap each side of a layer, not a list of numbers: it travels in config.json."""
    _, plan = pruned()
    assert len(json.dumps(plan.to_dict())) < len(plan.layers) * (2 * (FFN // 4) + 150)


# -- malformed -------------------------------------------------------------------------------------------------


def broken(change):
    data = as_json(pruned()[1])
    return change(data) or data


def entry(**changes):
    return lambda data: data["layers"][LAYER].update(changes)


def without(key):
    return lambda data: data["layers"][LAYER].pop(key) and None


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: [1], "must be a mapping with 'format' and 'layers'"),
        (lambda d: "plan", "must be a mapping with 'format' and 'layers'"),
        (lambda d: {"format": 1}, "must be a mapping with 'format' and 'layers'"),
        (lambda d: {"format": 1, "layers": []}, "must be a mapping with 'format' and 'layers'"),
        (lambda d: d.update(format=2), r"format must be 1 \(got 2\)"),
        (lambda d: d.pop("format") and None, r"format must be 1 \(got None\)"),
        (lambda d: d["layers"].update({LAYER: [1]}), f"layer '{LAYER}' needs shape"),
        (lambda d: d["layers"].update({LAYER: None}), f"layer '{LAYER}' needs shape"),
        (without("shape"), f"layer '{LAYER}' needs shape .*'shape'"),
        (without("bias"), f"layer '{LAYER}' needs shape .*'bias'"),
        (without("rows"), f"layer '{LAYER}' needs shape .*'rows'"),
        (without("cols"), f"layer '{LAYER}' needs shape .*'cols'"),
        (entry(shape=[48]), f"layer '{LAYER}' needs shape"),
        (entry(shape=[48, 48, 48]), f"layer '{LAYER}' needs shape"),
        (entry(shape="48"), f"layer '{LAYER}' needs shape"),
        (entry(shape=None), f"layer '{LAYER}' needs shape"),
        (entry(shape=["a", 48]), f"layer '{LAYER}' needs shape"),
        (entry(shape=[48.5, 48]), f"layer '{LAYER}' needs shape"),
        (entry(shape=[-48, 48], rows="all"), f"layer '{LAYER}' needs shape"),
        (entry(shape=[0, 48], rows="all"), f"layer '{LAYER}' needs shape"),
        (entry(shape=[10**15, 48], rows="all"), f"layer '{LAYER}' needs shape"),
        (entry(bias="no"), f"layer '{LAYER}' needs shape"),
        (entry(rows="every"), f"layer '{LAYER}': rows must be 'all' or a hexadecimal bitmap .*'every'"),
        (entry(rows="abc"), f"layer '{LAYER}': rows must be 'all' or a hexadecimal bitmap"),
        (entry(rows=None), f"layer '{LAYER}': rows must be 'all' or a hexadecimal bitmap .*None"),
        (entry(rows=[0, 1]), f"layer '{LAYER}': rows must be 'all' or a hexadecimal bitmap"),
        (entry(cols="ff"), rf"layer '{LAYER}': cols must hold 6 bytes for 48 channels \(got 1\)"),
        (entry(cols="ff" * 7), rf"layer '{LAYER}': cols must hold 6 bytes for 48 channels \(got 7\)"),
        (entry(shape=[44, 48], rows="ff" * 6), f"layer '{LAYER}': rows keeps channel 47, but there are 44"),
    ],
)
def test_malformed(change, message):
    with pytest.raises(ValueError, match="plan: " + message):
        Plan.from_dict(broken(change))


# -- plans of other models -------------------------------------------------------------------------------------


def changed(plan, name, **fields):
    layers = dict(plan.layers)
    old = layers[name]
    values = {f: getattr(old, f) for f in ("rows", "cols", "out_features", "in_features", "bias")}
    layers[name] = LayerPlan(**values | fields)
    return Plan(layers)


def test_check_takes_its_own():
    for family in FAMILIES:
        for share in (0.0, 0.5, 1.0):
            model, plan = pruned(family, share)
            check(plan, table(model))


def test_plan_of_another_family():
    with pytest.raises(ValueError, match=r"plan: layer 'bert\..*' is not in the plan; this plan is for another model"):
        check(pruned("distilbert")[1], table(build("bert")))


def test_plan_with_more_or_fewer_layers():
    model, plan = pruned()
    fewer = {n: layer for n, layer in plan.layers.items() if n != LAYER}
    with pytest.raises(ValueError, match=f"plan: layer '{LAYER}' is not in the plan"):
        check(Plan(fewer), table(model))
    with pytest.raises(ValueError, match="plan: layer 'distilbert.transformer.layer.2.* is not in the model"):
        check(pk.plan(model_of_three_layers()), table(model))


def model_of_three_layers():
    model = build(layers=3)
    attached(model)
    return model


def test_plan_of_other_shapes():
    model, plan = pruned()
    wide = build(hidden_dim=FFN + 8)
    with pytest.raises(
        ValueError, match=rf"lin1' must be \[{FFN + 8}, {HIDDEN}\], bias True \(got \[{FFN}, {HIDDEN}\], bias True\)"
    ):
        check(plan, table(wide))
    with pytest.raises(ValueError, match=r"bias True \(got \[48, 48\], bias False\)"):
        check(changed(plan, LAYER, bias=False), table(model))


@pytest.mark.parametrize("part,side", [("k", "rows"), ("o", "cols"), ("down", "cols"), ("q", "cols"), ("up", "cols")])
def test_channels_that_fall_together_must(part, side):
    model, plan = pruned(share=0.5)
    name = names("distilbert", 1)[part]
    other = getattr(plan.layers[name], side)[1:]
    with pytest.raises(ValueError, match=f"{side} of layer '{name}' do not match the channel groups they fall with"):
        check(changed(plan, name, **{side: other}), table(model))


def test_queries_of_a_vanished_head_must_fall():
    model = build()
    n = names("distilbert")
    values = np.ones(HIDDEN, bool)
    values[:HEAD_DIM] = False
    keep_only(attached(model), {n["v"]: values})
    plan = pk.plan(model)
    whole = torch.arange(HIDDEN)
    bad = changed(changed(plan, n["q"], rows=whole), n["k"], rows=whole)
    with pytest.raises(ValueError, match=rf"rows of layer '{n['q']}' .* \(expected 36 kept, got 48\)"):
        check(bad, table(model))


def test_checks_do_not_change_the_plan():
    model, plan = pruned()
    before = copy.deepcopy(plan.to_dict())
    check(plan, table(model))
    assert plan.to_dict() == before


def test_share_of_what_nobody_counts_is_refused():
    plan = pk.plan(prune(attached(build()), 0.4, seed=1).model)
    with pytest.raises(ValueError, match=r"sparsity: cost must be one of \('params', 'macs'\) \(got 'flops'\)"):
        plan.sparsity("flops")
