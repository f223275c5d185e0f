"""bench/accuracy/ablations.py: every variant differs from the recipe, and its replacements do what they say."""

from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

import prunekern as pk
from bench.accuracy.ablation_parts import (
    Averaged,
    HardConcrete,
    Lagrangian,
    Means,
    OfSamples,
    OfSteps,
    SharedScale,
    Teacher,
    shuffled_inside,
)
from bench.accuracy.ablation_train import WarmStates, train
from bench.accuracy.ablation_variants import BASE, RECIPE, VARIANTS, Variant
from prunekern.pruning import budget
from prunekern.training.trainer import SCHEDULE
from tests.helpers.tiny_models import attached, batch, build, logits


class Rows(list):
    def __getitem__(self, key):
        return [len(r["input_ids"]) for r in self] if key == "length" else super().__getitem__(key)


def collate(rows):
    inputs = {k: torch.stack([r[k] for r in rows]) for k in ("input_ids", "attention_mask")}
    return {**inputs, "labels": torch.tensor([r["labels"] for r in rows])}


def some_rows():
    inputs = batch()
    return Rows({"labels": i % 2, **{k: v[i % len(v)] for k, v in inputs.items()}} for i in range(24))


def test_variants_are_all_different():
    settings = [tuple(asdict(v).items()) for v in VARIANTS.values()]
    assert len(set(settings)) == len(settings) and VARIANTS["first recipe"] == BASE and VARIANTS["recipe"] == RECIPE


def test_hard_concrete_takes_values_between_and_is_binary_when_final():
    pruner = attached(build(), sparsity=0.4, ramp_steps=0)
    pruner.step()
    mask = next(iter(pruner.masks.values())).train()
    mask.__class__ = HardConcrete
    values = mask()
    soft = torch.sigmoid((mask.logits - mask.threshold + mask.noise) * 1.5)
    torch.testing.assert_close(values, (1.2 * soft - 0.1).clamp(0, 1))
    assert bool(((values > 0) & (values < 1)).any())
    pruner.finalize()
    assert set(mask().tolist()) <= {0.0, 1.0}


def test_lagrangian_has_the_gradient_of_the_expected_share():
    pruner = attached(build(), sparsity=0.4, ramp_steps=0)
    with torch.no_grad():
        for mask in pruner.masks.values():  # as wide as after the warm steps: probabilities up to 1
            mask.logits.normal_(std=4, generator=torch.Generator().manual_seed(mask.logits.numel()))
            mask.logits[3] = 0.5
    penalty = Lagrangian(pruner)
    penalty.first = 1.0
    penalty.penalty().backward()
    name, mask = next((n, m) for n, m in pruner.masks.items() if n.endswith("lin1"))

    def share(logits):
        kept = {c: torch.sigmoid(m.logits.detach().double()).numpy() for c, m in pruner.masks.items()}
        kept[name] = torch.sigmoid(logits.double()).numpy()
        return budget.removed_share(pruner.table, kept, "params")

    step = torch.zeros_like(mask.logits)
    step[3] = 1e-3
    slope = (share(mask.logits.detach() + step) - share(mask.logits.detach() - step)) / 2e-3
    assert float(mask.logits.grad[3]) == pytest.approx(-slope, rel=1e-2)
    assert penalty.gap == pytest.approx(pruner.target() - share(mask.logits.detach()), abs=1e-9)


def test_teacher_is_the_model_with_all_masks_on():
    for kind in ("self", "warm"):
        model = build()
        pruner = attached(model, sparsity=0.4, ramp_steps=0)
        pruner.step()
        for mask in pruner.masks.values():
            mask.threshold.fill_(-1e9)
        want = logits(model.eval(), batch())
        pruner.step()
        model.train()
        teacher = Teacher(pruner, Variant(teacher=kind, distil_logits=1.0))
        thresholds = [m.threshold.clone() for m in pruner.masks.values()]
        torch.testing.assert_close(teacher.teach(batch()).logits, want)
        assert all(torch.equal(m.threshold, t) for m, t in zip(pruner.masks.values(), thresholds, strict=True))
        assert model.training


def test_random_inside_keeps_the_allocation():
    pruner = attached(build(), sparsity=0.4)
    before = {c: m.logits.detach().clone() for c, m in pruner.masks.items()}
    shuffled_inside(pruner, 0)
    for c, m in pruner.masks.items():
        assert not torch.equal(m.logits, before[c])
        assert torch.equal(m.logits.detach().sort().values, before[c].sort().values)


def test_a_run_from_a_warm_state_is_the_run_that_warmed_itself():
    """Dropout included; a variant that differs after the warm steps only takes the same state."""
    variant = replace(BASE, steps=9, batch=4, warm=4, ramp=2, stage_one=7, warmup=2, share=0.4)
    states = WarmStates()

    def run(v, states):
        torch.manual_seed(0)
        model = build(dropout=0.1)
        pruner, _ = train(v, 0, model, some_rows(), collate, states)
        return pruner

    taken, warm = run(variant, states), list(states.states)
    given = run(variant, states)
    assert len(warm) == len(states.states) == 1
    for (name, a), b in zip(taken.model.state_dict().items(), given.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    other = run(replace(variant, spread=1.0), states)
    assert len(states.states) == 1 and other.sparsity() >= 0.4
    run(replace(variant, lr=1e-3), states)
    assert len(states.states) == 2


def test_a_removed_channel_stands_at_its_mean_for_the_layers_that_read_it():
    pruner = attached(build(), sparsity=0.4, ramp_steps=0)
    for mask in pruner.masks.values():
        mask.threshold.fill_(-1e9)
    means = Means(pruner)
    means.gather(some_rows(), collate, 0)
    pruner.step()
    means.fold()  # as after every draw: what it says of other masks must not stay
    pruner.finalize()
    means.fold()
    for name, group in pruner.table.groups.items():
        kept = pruner.masks[name].kept()
        for reader, cols in group.removed_cols.items():
            layer, off = pruner.layers[reader].eval(), cols[~kept].flatten()
            x = torch.randn(5, layer.in_features)
            removed, stood = x.clone(), x.clone()
            removed[:, off], stood[:, off] = 0.0, means.means[reader][off]
            got, before = layer(removed), layer.bias.clone()
            layer.bias.data.copy_(means.bias[reader])
            torch.testing.assert_close(got, layer(stood), rtol=1e-4, atol=1e-5)
            assert (layer(removed) - got).abs().max() > 1e-3
            layer.bias.data.copy_(before)


def test_means_leave_padding_out():
    pruner = attached(build(), sparsity=0.4, warm_steps=5)
    name, seen = next(n for n in pruner.layers if n.endswith("lin2")), []
    rows, means = some_rows(), Means(pruner)
    means.gather(rows, collate, 0)
    hook = pruner.layers[name].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    inputs = collate(list(rows))
    pruner.model.eval()(**inputs)
    hook.remove()
    assert not inputs["attention_mask"].all()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(means.means[name], seen[0][real].mean(0), rtol=1e-4, atol=1e-6)


def test_average_is_of_what_was_observed():
    pruner = attached(build(), sparsity=0.4)
    average, layer, want = Averaged(pruner), next(iter(pruner.layers.values())), 0.0
    for _ in range(3):
        with torch.no_grad():
            layer.B.add_(torch.randn(layer.B.shape))
        average.observe()
        want = want + layer.B.detach() / 3
    average.take()
    torch.testing.assert_close(layer.B.detach(), want)


def test_one_scale_keeps_the_proportions_of_the_gradients():
    logits = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = SharedScale(logits, lr=0.1)
    for _ in range(5):
        for p, g in zip(logits, ([4.0, 0.0, -2.0], [1.0, 0.0]), strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    moved = torch.cat([p.detach() for p in logits])
    gradient = torch.tensor([4.0, 0.0, -2.0, 1.0, 0.0])
    torch.testing.assert_close(moved, -0.5 * gradient / gradient.square().mean().sqrt())


def test_saliency_of_single_samples_is_what_autograd_says():
    pruner = attached(build(), sparsity=0.4, warm_steps=5)
    model, inputs, labels = pruner.model.train(), batch(), torch.tensor([0, 1, 1, 0])
    pruner.gather_with(partial(OfSamples, layers=pruner.layers))
    model(**inputs, labels=labels).loss.backward()
    pruner.step()
    found = {c: m.saliency.clone() for c, m in pruner.masks.items()}
    want = {c: torch.zeros_like(s) for c, s in found.items()}
    for i in range(4):
        for mask in pruner.masks.values():
            mask.logits.grad = None
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        (model(**one, labels=labels[i : i + 1]).loss / 4).backward()
        for c, mask in pruner.masks.items():
            want[c] += mask.logits.grad.square()
    ratio = torch.cat(list(found.values())).sum() / torch.cat(list(want.values())).sum()
    for c in found:
        torch.testing.assert_close(found[c], want[c] * ratio, rtol=1e-4, atol=1e-6 * float(found[c].max()))


def test_saliency_of_steps_is_the_square_of_the_whole_gradient():
    pruner = attached(build(), sparsity=0.4, warm_steps=5)
    pruner.gather_with(OfSteps)
    pruner.model.train()(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    want = {c: m.logits.grad.square() for c, m in pruner.masks.items()}
    pruner.step()
    mean = torch.cat(list(want.values())).mean()
    for c, mask in pruner.masks.items():
        torch.testing.assert_close(mask.saliency, want[c] / mean)


def test_the_recipe_is_the_products():
    """Shares of 250 steps in PruneTrainer's SCHEDULE, and PruneConfig's defaults."""
    boundary = round(RECIPE.steps * SCHEDULE["stage_one"])
    assert RECIPE.stage_one == boundary and RECIPE.mask_lr == SCHEDULE["mask_learning_rate"]
    assert abs(RECIPE.warm - boundary * SCHEDULE["warm"]) < 1 and abs(RECIPE.ramp - boundary * SCHEDULE["ramp"]) < 1
    config = pk.PruneConfig()
    assert (RECIPE.spread, RECIPE.temperature) == (config.spread, config.temperature)
