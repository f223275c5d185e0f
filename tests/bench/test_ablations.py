"""bench/ablations.py: every variant differs from the recipe, and its replacements do what they say."""

from dataclasses import asdict

import pytest
import torch
from ablation_parts import HardConcrete, Lagrangian, Teacher, shuffled_inside
from ablation_variants import BASE, VARIANTS, Variant
from tiny_models import attached, batch, build, logits

from prunekern import budget


def test_variants_are_all_different():
    settings = [tuple(asdict(v).items()) for v in VARIANTS.values()]
    assert len(set(settings)) == len(settings) and VARIANTS["recipe"] == BASE


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
        torch.testing.assert_close(teacher._teach(batch()).logits, want)
        assert all(torch.equal(m.threshold, t) for m, t in zip(pruner.masks.values(), thresholds, strict=True))
        assert model.training


def test_random_inside_keeps_the_allocation():
    pruner = attached(build(), sparsity=0.4)
    before = {c: m.logits.detach().clone() for c, m in pruner.masks.items()}
    shuffled_inside(pruner, 0)
    for c, m in pruner.masks.items():
        assert not torch.equal(m.logits, before[c])
        assert torch.equal(m.logits.detach().sort().values, before[c].sort().values)
