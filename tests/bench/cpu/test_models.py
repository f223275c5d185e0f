"""Models of the benchmarks: that one model is raced under different names, and the tables' arithmetic."""

import copy

import pytest
import torch

import prunekern as pk
from bench.common import shapes, sliced
from bench.common.answers import check_logits
from bench.cpu import models
from tests.helpers import tiny_models


def ragged_plan(dense, family):
    """A plan in which one head lost its queries and keys, and another its values."""
    pruner = pk.attach(copy.deepcopy(dense), pk.PruneConfig())
    generator = torch.Generator().manual_seed(0)
    q, v = (tiny_models.names(family)[part] for part in "qv")
    for name, mask in pruner.masks.items():
        mask.logits.data = torch.randn(mask.logits.shape, generator=generator)
        if name == q:
            mask.logits.data[: tiny_models.HEAD_DIM] = -1
        if name == v:
            mask.logits.data[-tiny_models.HEAD_DIM :] = -1
    return pk.plan(pruner.model)


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_the_sliced_peer_is_the_masked_model(family):
    dense = tiny_models.build(family)
    plan = ragged_plan(dense, family)
    inputs = tiny_models.batch()
    exact = sliced.masked(dense, plan)(**inputs).logits
    small = sliced.sliced(dense.double(), plan)
    torch.testing.assert_close(small(**inputs).logits, exact, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(dense(**inputs).logits, exact, rtol=1e-2, atol=1e-2)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, dense)]
    assert sizes[0] < sizes[1]


def test_the_gate_refuses_a_wrong_answer():
    exact = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    check_logits("a peer", exact.float(), exact)
    for wrong in (exact + 1e-3, exact * float("nan")):
        with pytest.raises(SystemExit, match="a peer: wrong answer"):
            check_logits("a peer", wrong.float(), exact)


def test_ratios_are_against_the_best_peer():
    ms = {("a", "dense"): 8.0, ("a", "sliced"): 6.0, ("b", "dense"): 9.0, ("b", "sliced"): 5.0}
    ms |= {("compact", "fp32"): 4.0, ("compact", "bf16"): 2.0}
    rows = models.rows_of("model", (1, 128), ms, ["a", "b"])
    assert [(row["x_dense"], row["x_sliced"]) for row in rows] == [(2.0, 1.5), (2.25, 1.25)]
    fp32, bf16 = models.summary_of(rows, ms, {"fp32": 120.0, "bf16": 55.0}, ideal=4 / 3)
    assert (fp32["best_dense"], fp32["x_best_dense"]) == ("a 8.00", 2.0)
    assert (fp32["best_sliced"], fp32["x_best_sliced"]) == ("b 5.00", 1.25)
    assert (bf16["x_best_dense"], bf16["x_best_sliced"]) == (4.0, 2.5)


def test_a_plan_keeps_the_share_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny", tiny_models.build)
    dense = shapes.dense_model("tiny")
    small, plan = shapes.ragged(dense, 0.4, cost="macs")
    assert abs(plan.macs() / plan.dense_macs() - 0.6) < 0.02
    widths = [len(layer.rows) for name, layer in plan.layers.items() if name.endswith("ffn.lin1")]
    assert len(set(widths)) == len(widths)  # ragged
    inputs = tiny_models.batch()
    check_logits("compact", small(**inputs).logits, sliced.masked(dense, plan)(**inputs).logits)
