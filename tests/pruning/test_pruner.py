"""The plain training loop: budget followed step by step, noise by (seed, step), final masks, state to resume from."""

import numpy as np
import pytest
import torch

import prunekern as pk
from prunekern.compacting.plan import from_kept
from tests.helpers.tiny_models import (
    FAMILIES,
    FFN,
    HEAD_DIM,
    HIDDEN,
    attached,
    batch,
    build,
    keep_only,
    logits,
    names,
    state,
    unchanged,
)

LABELS = torch.tensor([0, 1, 2, 0])


def train(model, pruner, steps, lr=1e-2, mask_lr=0.05, optimizer=None):
    """A plain loop; returns the optimiser and the losses."""
    optimizer = torch.optim.AdamW(pruner.param_groups(lr, mask_lr)) if optimizer is None else optimizer
    losses = []
    model.train()
    for step in range(steps):
        loss = model(**batch(seed=step), labels=LABELS).loss + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(float(loss.detach()))
    return optimizer, losses


# -- the budget ------------------------------------------------------------------------------------------------


def test_ramp():
    pruner = attached(build(), sparsity=0.4, ramp_steps=8)
    assert [pruner.target(k) for k in (0, 2, 4, 8, 9, 1000)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4, 0.4])
    assert pruner.target() == 0
    pruner.step()
    assert pruner.target() == pytest.approx(0.05)
    at_once = attached(build(), sparsity=0.4, ramp_steps=0)
    assert at_once.target(0) == at_once.target(5) == 0.4


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_share_follows_the_ramp_at_every_step(family, cost):
    model = build(family)
    pruner = attached(model, sparsity=0.5, ramp_steps=6, cost=cost)
    for step in range(1, 10):
        train(model, pruner, 1)
        assert pruner.steps == step
        assert pruner.expected_sparsity() == pytest.approx(0.5 * min(1, step / 6), abs=1e-5)
        thresholds = {float(m.threshold) for m in pruner.masks.values()}
        assert len(thresholds) == 1  # one global threshold


def test_sampled_masks_remove_about_the_scheduled_share():
    """What a forward pass sees: mean of 60 draws, 5 standard errors."""
    model = build()
    pruner = attached(model, sparsity=0.5, ramp_steps=0)
    dense = pruner.plan().dense_params()
    shares = []
    for _ in range(60):
        pruner.step()
        model.train()
        kept = {c: m().bool() for c, m in pruner.masks.items()}
        shares.append(1 - from_kept(pruner.table, kept).params() / dense)
    assert abs(np.mean(shares) - 0.5) <= 5 * np.std(shares) / 60**0.5 + 1e-4
    assert np.std(shares) > 1e-3


def test_logits_learn_which_channels_matter():
    """Half of the FFN's channels meet zero columns of the layer that reads them. The loss is the distance to the
    dense model, whose output rests on the other half: their logits rise above those that nothing moves.
    """
    model = build("distilbert", "token", layers=1)
    n = names("distilbert")
    useless = torch.arange(FFN) % 2 == 0
    with torch.no_grad():
        model.get_submodule(n["down"]).weight[:, useless] = 0
        model.get_submodule(n["down"]).weight[:, ~useless] *= 3
    wanted = [logits(model, batch(16, seed=s)) for s in range(40)]
    pruner = pk.attach(model, pk.PruneConfig(rank=4, targets=[n["up"]], sparsity=0.2, warm_steps=0, ramp_steps=5))
    optimizer = torch.optim.Adam(pruner.param_groups(lr=0.0, mask_lr=0.1))
    model.train()
    for s, want in enumerate(wanted):
        (model(**batch(16, seed=s)).logits - want).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    values = pruner.masks[n["up"]].logits.detach()
    assert float(values[~useless].mean()) > float(values[useless].mean()) + 0.3
    pruner.finalize()
    kept = pruner.masks[n["up"]].kept()
    assert int(kept[~useless].sum()) > int(kept[useless].sum())


# -- noise -----------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step():
    def noises(seed, steps):
        pruner = attached(build(), seed=seed)
        for _ in range(steps):
            pruner.step()
        return [m.noise.clone() for m in pruner.masks.values()]

    a = noises(0, 3)
    torch.rand(10)
    assert all(torch.equal(x, y) for x, y in zip(a, noises(0, 3), strict=True))
    for other in (noises(1, 3), noises(0, 2)):
        assert not any(torch.equal(x, y) for x, y in zip(a, other, strict=True))
    assert not torch.equal(a[0], a[1])  # two masks of one size do not share their noise


def test_forward_is_deterministic_between_steps_and_changes_with_them():
    model = build()
    pruner = attached(model, sparsity=0.5, ramp_steps=0)
    pruner.step()
    model.train()
    first = logits(model, batch())
    assert torch.equal(logits(model, batch()), first)
    pruner.step()
    assert not torch.equal(logits(model, batch()), first)


def test_step_refreshes_the_norm_once_for_all_forwards(monkeypatch):
    from prunekern import ops

    model = build()
    pruner = attached(model)
    optimizer, _ = train(model, pruner, 1)
    calls = []
    real = ops.dora_gain
    monkeypatch.setattr(ops, "dora_gain", lambda *a: calls.append(1) or real(*a))
    for step in range(2):  # gradient accumulation: several forwards, one optimiser step
        for micro in range(3):
            model(**batch(seed=micro), labels=LABELS).loss.backward()
        assert len(calls) == 12 * step
        optimizer.step()
        pruner.step()
        assert len(calls) == 12 * (step + 1)


# -- the stage boundary ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [1, 5, 8])
@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("rule", ["learned", "random", "magnitude"])
@pytest.mark.parametrize("family", FAMILIES)
def test_finalize_meets_the_budget_and_reports_the_plan(family, rule, cost, align):
    model = build(family)
    pruner = attached(model, sparsity=0.45, cost=cost, align=align)
    train(model, pruner, 2)
    arguments = {} if rule == "learned" else {"rule": "uniform", "criterion": rule}
    report = pruner.finalize(**arguments)
    plan = pk.plan(model)
    assert pruner.finalized and report["target"] == 0.45 and report["cost"] == cost
    assert report["sparsity"] == plan.sparsity(cost) >= 0.45
    # Met to within one block of the costliest mask: a block of v takes v rows, o columns and perhaps a head.
    dense = plan.dense_params() if cost == "params" else plan.dense_macs()
    step = max(2 * HIDDEN, HIDDEN + FFN) * align + 2 * HEAD_DIM * (HIDDEN + 1)
    assert report["sparsity"] - 0.45 <= step / dense
    for name, mask in pruner.masks.items():
        left = int(mask.kept().sum())
        assert left % align == 0 or left == mask.logits.numel()
        assert report["kept"][name] == [len(plan.layers[name].rows), mask.logits.numel()]
    for kind in ("query_key", "value", "ffn", "residual"):
        own = [report["kept"][c] for c in pruner.masks if pruner.table.groups[c].kind == kind]
        assert report["by_kind"][kind] == [sum(k for k, _ in own), sum(n for _, n in own)]
    assert pruner.report() == report
    assert pruner.expected_sparsity() == pytest.approx(report["sparsity"], abs=1e-9)
    assert pruner.sparsity() == report["sparsity"]


def test_final_masks_are_the_same_in_training_and_eval_and_stay():
    model = build()
    pruner = attached(model, sparsity=0.4)
    optimizer, _ = train(model, pruner, 3)
    pruner.finalize()
    kept = {c: m.kept().clone() for c, m in pruner.masks.items()}
    values = {c: m.logits.detach().clone() for c, m in pruner.masks.items()}
    for c, m in pruner.masks.items():
        assert torch.equal(m.train()() == 1, kept[c]) and torch.equal(m.eval()() == 1, kept[c])
        assert m.logits.grad is None and not m.logits.requires_grad
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, pruner, 3, optimizer=optimizer)  # stage two: the same optimiser, momentum and all
    for c, m in pruner.masks.items():
        assert torch.equal(m.logits, values[c]) and torch.equal(m.kept(), kept[c])
    changed = [n for n, p in model.named_parameters() if n in adapters and not torch.equal(p, adapters[n])]
    assert any(n.endswith(".A") for n in changed) and any("classifier" in n for n in changed)
    assert pruner.steps == 6


def test_learned_finalize_keeps_the_highest_logits():
    model = build()
    pruner = attached(model, sparsity=0.4)
    before = {c: m.logits.detach().clone() for c, m in pruner.masks.items()}
    pruner.finalize()
    kept = {c: m.kept() for c, m in pruner.masks.items()}
    for c, k in kept.items():
        if k.any() and not k.all():
            assert float(before[c][k].min()) > float(before[c][~k].max())
    assert 0 < sum(int(k.sum()) for k in kept.values())


def test_uniform_by_magnitude_keeps_the_largest_magnitudes():
    model = build()
    pruner = attached(model, sparsity=0.4)
    pruner.finalize("uniform", "magnitude")
    for c, m in pruner.masks.items():
        magnitude, kept = pruner.layers[c].magnitude.detach().abs(), m.kept()
        assert float(magnitude[kept].min()) >= float(magnitude[~kept].max())


def test_uniform_at_random_is_a_function_of_the_seed():
    def kept(seed):
        pruner = attached(build(), sparsity=0.4, seed=seed)
        pruner.finalize("uniform", "random")
        return [m.kept() for m in pruner.masks.values()]

    assert all(torch.equal(a, b) for a, b in zip(kept(0), kept(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept(0), kept(1), strict=True))


def test_finalize_refusals_leave_the_masks():
    model = build()
    pruner = attached(model, sparsity=0.4)
    pruner.step()
    before = state(model)
    with pytest.raises(ValueError, match=r"finalize: rule must be one of .*'heads'\) \(got 'best'\)"):
        pruner.finalize("best")
    with pytest.raises(ValueError, match=r"criterion must be one of .*'saliency'\), or scores \(got 'size'\)"):
        pruner.finalize("uniform", "size")
    unchanged(model, before)
    n = names("distilbert", 1)["up"]
    with torch.no_grad():
        pruner.masks[n].logits[3] = float("nan")
    before = {c: m.kept().clone() for c, m in pruner.masks.items()}
    with pytest.raises(ValueError, match=f"finalize: scores of '{n}' are not finite; the masks are left as they were"):
        pruner.finalize()
    assert not pruner.finalized and all(torch.equal(m.kept(), before[c]) for c, m in pruner.masks.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_logits_are_named_at_the_next_step(value):
    """They would empty every mask: no threshold is above NaN."""
    pruner = attached(build())
    name = names("distilbert", 1)["q"]
    with torch.no_grad():
        pruner.masks[name].logits[0] = value
    with pytest.raises(FloatingPointError, match=f"mask logits of '{name}' are not finite after step 1"):
        pruner.step()


def test_sparsity_zero_keeps_everything():
    model = build()
    pruner = attached(model, sparsity=0.0)
    train(model, pruner, 2)
    assert all(bool((m.train()() == 1).all()) for m in pruner.masks.values())
    report = pruner.finalize()
    assert report["sparsity"] == 0 and all(k == n for k, n in report["kept"].values())


def test_adapters_without_masks():
    model = build()
    pruner = attached(model, targets=["k_lin"], sparsity=0.0)
    assert not pruner.masks and [g["name"] for g in pruner.param_groups()] == ["adapters"]
    train(model, pruner, 2)
    assert pruner.finalize()["sparsity"] == pruner.expected_sparsity() == 0


# -- what is asked at any time ---------------------------------------------------------------------------------


def test_sparsity_is_that_of_the_plan_vanished_heads_included():
    model = build()
    pruner = attached(model)
    n = names("distilbert")
    values = np.ones(HIDDEN, bool)
    values[:HEAD_DIM] = False
    keep_only(pruner, {n["v"]: values})
    gone = 3 * HEAD_DIM * (HIDDEN + 1) + HIDDEN * HEAD_DIM  # v, and the q and k that nothing reads; columns of o
    plan = pk.plan(model)
    assert plan.params() == plan.dense_params() - gone
    assert pruner.sparsity() == pytest.approx(gone / plan.dense_params())
    assert pruner.report()["kept"][n["q"]] == [HIDDEN - HEAD_DIM, HIDDEN]


# -- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 5])
def test_resumed_plain_loop_ends_with_the_same_weights_and_masks(stop):
    """Model, optimiser and pruner state, by torch's own means; the boundary lies at step 4."""

    def run(model, pruner, optimizer, first, last):
        for step in range(first, last):
            torch.manual_seed(1000 + step)  # dropout
            loss = model(**batch(seed=step), labels=LABELS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruner.step()
            if step + 1 == 4:
                pruner.finalize()

    def fresh():
        model = build().train()
        pruner = attached(model, sparsity=0.4, ramp_steps=3, dropout=0.2)
        return model.train(), pruner, torch.optim.AdamW(pruner.param_groups(1e-2, 0.1))

    whole = fresh()
    run(*whole, 0, 8)
    first = fresh()
    run(*first, 0, stop)
    saved = [part.state_dict() for part in first]
    second = fresh()
    for part, own in zip(second, saved, strict=True):
        part.load_state_dict(own)
    run(*second, stop, 8)
    for (name, a), b in zip(whole[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole[1].plan() == second[1].plan() and second[1].finalized
