"""bench/accuracy/compare.py: its runs, its intervals, and the rules it measures against."""

import numpy as np
import pytest
import torch

from bench.accuracy.compare import MORE_SEEDS, path_of, wanted
from bench.accuracy.latency import DENSE, compact_of, points_of
from bench.accuracy.tables import METHODS, allocation, overlap, paired, right, rows_of
from bench.common.rules import LoraGradient
from tests.helpers.tiny_models import attached, batch, build, names


def run(correct, task="reviews", seed=0, method="ours", share=0.5, kept=None):
    correct = np.asarray(correct, bool)
    return {
        "task": task, "seed": seed, "method": method, "share": share, "removed": share, "texts": len(correct),
        "accuracy": float(correct.mean()), "right": np.packbits(correct).tobytes().hex(), "kept": kept or {},
    }  # fmt: skip


def test_every_run_has_a_name_of_its_own():
    runs = wanted(3, 5)
    assert len({path_of(*r) for r in runs}) == len(runs)
    rows = sum(len(shares) * (5 if name in MORE_SEEDS else 3) for name, shares in METHODS.items())
    assert len(runs) == 3 * rows
    assert [r[3] for r in runs] == sorted(r[3] for r in runs)


def test_right_comes_back():
    correct = np.random.default_rng(0).random(77) < 0.5
    assert np.array_equal(right(run(correct)), correct.astype(float))


def test_paired_interval_covers_a_known_difference():
    """b is right where a is not in 5 % of the texts: the interval holds the truth, and its width is the binomial's."""
    rng = np.random.default_rng(1)
    texts, truth = 2000, 5.0
    a = {s: run(np.ones(texts, bool), seed=s) for s in range(3)}
    b = {s: run(rng.random(texts) >= truth / 100, seed=s) for s in range(3)}
    mean, low, high = paired({"reviews": a}, {"reviews": b})
    assert low < truth < high and low < mean < high
    one = 100 * np.sqrt(0.05 * 0.95 / (3 * texts))  # texts and seeds are drawn anew: up to twice the variance
    assert 2 * 1.85 * one < high - low < 2 * 1.96 * one * np.sqrt(2) * 1.1


def test_paired_compares_shared_tasks_and_seeds_only():
    a = {"reviews": {0: run([1, 1]), 1: run([0, 0], seed=1)}, "topics": {0: run([0, 0], "topics")}}
    b = {"reviews": {0: run([1, 0])}, "tweets": {0: run([1, 1], "tweets")}}
    assert paired(a, b)[0] == 50.0
    assert paired(a, {"tweets": {0: run([1, 1], "tweets")}}) is None


def test_overlap_of_plans():
    masks = {0: "f0", 1: "ff", 2: "0f"}
    seeds = {s: run([1], seed=s, kept={"a": bits}) for s, bits in masks.items()}
    assert overlap(seeds) == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert overlap({0: seeds[0]}) is None


def test_rows_hold_means_over_tasks():
    runs = {}
    for method, share, first, second in (("DoRA", 0.0, [1, 1], [1, 0]), ("ours", 0.5, [1, 0], [1, 0])):
        runs[method, share] = {
            "reviews": {0: run(first, method=method, share=share)},
            "topics": {0: run(second, "topics", method=method, share=share)},
        }
    dora, ours = rows_of(runs)
    assert (dora["mean"], ours["mean"], ours["minus_DoRA"].split()[0]) == ("75.00", "50.00", "-25.00")
    assert dora["minus_DoRA"] is None and ours["ours_minus_it"] is None


def test_lora_gradient_is_the_published_formula():
    pruner = attached(build(), sparsity=0.4)
    model = pruner.model.train()
    model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    rule = LoraGradient(pruner)
    rule.on_pre_optimizer_step(None, None, None)
    n = names("distilbert")

    def importance(name):
        layer = pruner.layers[name]
        a, b = layer.A.detach().double(), layer.B.detach().double()
        da, db = layer.A.grad.double(), layer.B.grad.double()
        gradient = torch.einsum("nr,rk->nk", db, a) + torch.einsum("nr,rk->nk", b, da)
        gradient -= torch.einsum("nr,rk->nk", db, da)
        return ((layer.weight.double() + layer.scale * b @ a) * gradient) ** 2

    want = importance(n["up"])[5].sum() + importance(n["down"])[:, 5].sum()
    assert rule.scores[n["up"]][5] == pytest.approx(0.1 * float(want), rel=1e-3)
    want = importance(n["q"])[7].sum() + importance(n["k"])[7].sum()
    assert rule.scores[n["q"]][7] == pytest.approx(0.1 * float(want), rel=1e-3)
    pruner.finalize("uniform", rule.scores)
    before = {c: s.copy() for c, s in rule.scores.items()}
    rule.on_pre_optimizer_step(None, None, None)
    assert all(np.array_equal(before[c], s) for c, s in rule.scores.items())


def test_latency_is_of_the_plan_that_a_run_ended_with():
    pruner = attached(build(), sparsity=0.4)
    pruner.finalize("uniform", "random")
    bits = {c: np.packbits(m.kept().numpy()).tobytes().hex() for c, m in pruner.masks.items()}
    dense = build()
    small, plan = compact_of({"kept": bits, "method": "ours"}, dense)
    want = pruner.plan()
    assert all(torch.equal(plan.layers[n].rows, want.layers[n].rows) for n in want.layers)
    assert small is not dense and plan.params() == want.params()


def test_latency_points_are_relative_to_the_dense_model():
    runs = {
        (m, s): {"reviews": {0: run(correct, method=m, share=s)}}
        for m, s, correct in (("DoRA", 0.0, [1, 1]), ("LoRA", 0.0, [1, 0]), ("ours", 0.5, [1, 0]))
    }
    rows = [{"method": DENSE, "share": 0.0, "task": None, "ms": {"1 x 128": 10.0}}]
    rows += [{"method": "ours", "share": 0.5, "task": t, "ms": {"1 x 128": ms}} for t, ms in (("a", 4.0), ("b", 6.0))]
    points = points_of(rows, runs, "1 x 128")
    assert points["ours"][0][:2] == (0.5, -50.0) and points["LoRA"][0][:2] == (1.0, -50.0) and "DoRA" not in points


def test_allocation_is_the_mean_by_carrier_and_block():
    kept = [
        {"m.layer.0.ffn.lin1": "ff", "m.layer.1.ffn.lin1": "0f"},
        {"m.layer.0.ffn.lin1": "0f", "m.layer.1.ffn.lin1": "0f"},
    ]
    group = {"reviews": {s: run([1], seed=s, kept=k) for s, k in enumerate(kept)}}
    assert allocation(group) == [{"carrier": "lin1", "block_0": 75, "block_1": 50}]
