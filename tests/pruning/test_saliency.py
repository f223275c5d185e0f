"""Warm steps: masks all on, saliency the squared losses by token, logits that start from it."""

import numpy as np
import pytest
import torch

import prunekern as pk
from prunekern.pruning.saliency import group_cost, starting_logits
from tests.helpers.tiny_models import FFN, HIDDEN, attached, batch, build, logits, names

LABELS = torch.tensor([0, 1, 2, 0])


def run(pruner, seeds, micro=1, scale=1.0):
    """Backward passes and pruner steps, without any optimiser: every gradient is taken at the same weights."""
    model = pruner.model.train()
    for seed in seeds:
        model.zero_grad()
        rows = batch(seed=seed)
        for part in range(micro):
            cut = {k: v[part * 4 // micro : (part + 1) * 4 // micro] for k, v in rows.items()}
            labels = LABELS[part * 4 // micro : (part + 1) * 4 // micro]
            (scale * model(**cut, labels=labels).loss / micro).backward()
        pruner.step()


def squared_losses(seed, dtype):
    """By definition: the gradient of the output, times the output, squared, summed over tokens."""
    model = build(dtype=dtype)
    pruner = attached(model, warm_steps=0)
    for mask in pruner.masks.values():
        mask.finalize(torch.ones_like(mask.logits, dtype=torch.bool))
    model.train()
    kept, grads = {}, {}
    for name, layer in pruner.layers.items():
        layer.register_forward_hook(lambda m, i, o, name=name: kept.__setitem__(name, o))
    loss = model(**batch(seed=seed), labels=LABELS).loss
    outputs = {n: kept[n] for n in pruner.masks}
    for (name, out), grad in zip(outputs.items(), torch.autograd.grad(loss, outputs.values()), strict=True):
        grads[name] = (out * grad).flatten(0, -2).square().sum(0).detach()
    return grads


def test_saliency_is_the_squared_loss_by_token():
    pruner = attached(build(dtype=torch.float64), warm_steps=5)
    want = {name: 0.0 for name in pruner.masks}
    for seed in (1, 2):
        squares = squared_losses(seed, torch.float64)
        mean = torch.cat(list(squares.values())).mean()
        want = {n: want[n] + s / mean for n, s in squares.items()}
    run(pruner, (1, 2))
    for name, mask in pruner.masks.items():
        torch.testing.assert_close(mask.saliency.double(), want[name].double(), rtol=1e-4, atol=1e-6)


def test_rows_of_a_group_add_up():
    mask = pk.nn.ChannelMask(2, torch.tensor([0, 1, 0, 1]))
    layer = pk.nn.MaskedDoRALinear(torch.randn(4, 3), rank=2, mask=mask).train()
    assert mask.probe_rows() is None
    mask.open(True)
    x, dy = torch.randn(5, 3), torch.randn(5, 4)
    y = layer(x)
    y.backward(dy)
    rows = (y.detach() * dy).square().sum(0)
    torch.testing.assert_close(mask.probe.grad, torch.stack([rows[0] + rows[2], rows[1] + rows[3]]))
    assert mask.eval().probe_rows() is None
    mask.double()
    assert mask.probe.dtype == torch.float64 and mask.probe.requires_grad and mask.probe.grad is None
    mask.finalize(torch.tensor([True, False]))
    assert mask.probe is None and "probe" not in mask.state_dict()


@pytest.mark.parametrize("checkpointed", [True, False])
def test_saliency_under_compile_and_checkpointing(checkpointed):
    plain, other = (attached(build(), warm_steps=5) for _ in range(2))
    if checkpointed:
        other.model.gradient_checkpointing_enable()
    else:
        torch._dynamo.reset()
        other.model.forward = torch.compile(other.model.forward, backend="aot_eager")
    for pruner in (plain, other):
        run(pruner, (1, 2))
    for a, b in zip(plain.masks.values(), other.masks.values(), strict=True):
        torch.testing.assert_close(a.saliency, b.saliency, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [{"micro": 2}, {"scale": 1000.0}])
def test_micro_batches_and_loss_scale_do_not_matter(change):
    whole, parts = (attached(build(), warm_steps=5) for _ in range(2))
    run(whole, (1, 2))
    run(parts, (1, 2), **change)
    for a, b in zip(whole.masks.values(), parts.masks.values(), strict=True):
        torch.testing.assert_close(a.saliency, b.saliency, rtol=1e-3, atol=1e-4)


def test_a_step_that_overflowed_is_left_out():
    pruner = attached(build(), warm_steps=5)
    run(pruner, (1,))
    before = [m.saliency.clone() for m in pruner.masks.values()]
    run(pruner, (2,), scale=float("inf"))
    assert all(torch.equal(m.saliency, b) for m, b in zip(pruner.masks.values(), before, strict=True))


def test_all_masks_are_on_while_warm_wherever_the_logits_go():
    model = build()
    pruner = attached(model, sparsity=0.5, warm_steps=3, ramp_steps=0)
    optimizer = torch.optim.SGD(pruner.param_groups(0.0, 1000.0))
    dense = logits(model.train(), batch())
    for step in range(2):
        model(**batch(seed=step), labels=LABELS).loss.backward()
        optimizer.step()
        pruner.step()
        assert pruner.warm and pruner.expected_sparsity() == pruner.sparsity() == pruner.target() == 0
        assert torch.equal(logits(model.train(), batch()), dense)
        assert all(bool(m.kept().all()) for m in pruner.masks.values())
    pruner.step()
    assert not pruner.warm and pruner.expected_sparsity() == pytest.approx(0.5, abs=1e-5)
    assert not torch.equal(logits(model.train(), batch()), dense)
    assert all(m.logits.requires_grad and not m.is_open for m in pruner.masks.values())


def test_logits_start_from_saliency_by_cost():
    pruner = attached(build(), warm_steps=2, spread=1.5)
    run(pruner, (1, 2))
    assert not pruner.warm
    score = {}
    for c, m in pruner.masks.items():
        score[c] = np.log(m.saliency.double().numpy() / group_cost(pruner.table, c, "params"))
    flat = np.concatenate(list(score.values()))
    for c, m in pruner.masks.items():
        want = 1.5 * np.clip((score[c] - flat.mean()) / flat.std(), -3, 3)
        np.testing.assert_allclose(m.logits.detach().numpy(), want, rtol=1e-4, atol=1e-4)


def test_cost_of_a_group_written_out():
    table = attached(build()).table
    n = names("distilbert")
    want = {"q": 2 * (HIDDEN + 1), "v": HIDDEN + 1 + HIDDEN, "o": HIDDEN + 1, "up": 2 * HIDDEN + 1, "down": FFN + 1}
    assert {k: group_cost(table, n[k], "params") for k in want} == want
    assert group_cost(table, n["up"], "macs") == 2 * HIDDEN


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_flat_saliency_starts_flat(value):
    table = attached(build()).table
    cost = {c: group_cost(table, c, "params") for c in table.groups}
    scores = {c: np.full(g.count, value * cost[c]) for c, g in table.groups.items()}
    for start in starting_logits(table, scores, "params", 2.0).values():
        assert np.isfinite(start).all() and float(np.abs(start).max()) < 1e-6


def test_finalize_while_warm_ranks_by_what_was_gathered():
    pruner = attached(build(), sparsity=0.4, warm_steps=50)
    run(pruner, (1, 2, 3))
    saliency = {c: m.saliency.clone() for c, m in pruner.masks.items()}
    pruner.finalize()
    assert pruner.sparsity() >= 0.4 and not pruner.warm
    for c, mask in pruner.masks.items():
        if bool(mask.kept().any()) and not bool(mask.kept().all()):
            assert float(saliency[c][mask.kept()].min()) >= float(saliency[c][~mask.kept()].max())


def test_uniform_by_saliency_and_by_scores_of_ones_own():
    pruner = attached(build(), sparsity=0.4, warm_steps=50)
    with pytest.raises(ValueError, match="criterion 'saliency' needs warm steps; none were taken"):
        pruner.finalize("uniform", "saliency")
    run(pruner, (1, 2))
    other = attached(build(), sparsity=0.4)
    name = names("distilbert")["q"]
    scores = {c: m.saliency.numpy() for c, m in pruner.masks.items()}
    with pytest.raises(ValueError, match=rf"criterion must have {HIDDEN} scores for '{name}' \(got \[3\]\)"):
        other.finalize("uniform", {**scores, name: np.zeros(3)})
    with pytest.raises(ValueError, match=rf"criterion must have {HIDDEN} scores for '{name}' \(got none\)"):
        other.finalize("uniform", {c: s for c, s in scores.items() if c != name})
    assert not other.finalized
    pruner.finalize("uniform", "saliency")
    other.finalize("uniform", scores)
    assert pruner.plan() == other.plan()
    shares = [k / n for k, n in pruner.report()["kept"].values()]
    assert max(shares) - min(shares) < 0.05


def test_resumed_in_the_middle_of_the_warm_steps():
    def fresh():
        return attached(build(), sparsity=0.4, warm_steps=4, ramp_steps=2)

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, range(6))
    run(first, range(2))
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert second.warm
    run(second, range(2, 6))
    for a, b in zip(whole.masks.values(), second.masks.values(), strict=True):
        assert torch.equal(a.logits, b.logits) and torch.equal(a.threshold, b.threshold)
        assert torch.equal(a.noise, b.noise)


def test_the_schedule_after_warm_steps():
    pruner = attached(build(), sparsity=0.4, warm_steps=3, ramp_steps=4)
    assert [pruner.target(k) for k in (0, 2, 3, 5, 7, 99)] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.4])
    pruner.schedule(0, 0)
    assert not pruner.warm and pruner.target(0) == 0.4


def test_flips_and_kept_shares():
    pruner = attached(build(), sparsity=0.4, ramp_steps=0)
    pruner.step()
    assert pruner.flips == 0
    shares = pruner.kept_shares()
    name = names("distilbert")["up"]
    mask = pruner.masks[name]
    want = torch.sigmoid(mask.logits - mask.threshold).mean()
    assert shares[name] == pytest.approx(float(want), abs=1e-6)
    assert set(shares) == {"query_key", "value", "ffn", "residual", *pruner.masks}
    with torch.no_grad():
        order = mask.logits.argsort()
        mask.logits[order[0]], mask.logits[order[-1]] = mask.logits[order[-1]].clone(), mask.logits[order[0]].clone()
    pruner.step()
    assert pruner.flips == 2
