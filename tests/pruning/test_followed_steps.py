"""Pruner.step() counts steps of the optimiser, however often it is called, and whatever optimises."""

import gc

import pytest
import torch

import prunekern as pk
from tests.helpers.tiny_models import attached, batch, build

LABELS = torch.tensor([0, 1, 2, 0])


def pruner_of(**options):
    return attached(build().train(), **{"sparsity": 0.4, "warm_steps": 2, "ramp_steps": 2} | options)


def backward(pruner, seed, micro=1, part=0, scale=1.0):
    rows = slice(4 * part // micro, 4 * (part + 1) // micro)
    inputs = {name: value[rows] for name, value in batch(seed=seed).items()}
    loss = pruner.model(**inputs, labels=LABELS[rows]).loss / micro * scale
    loss.backward()


def learned(pruner):
    return torch.cat([t.flatten() for m in pruner.masks.values() for t in (m.logits, m.saliency, m.noise)]).detach()


def test_accelerate_accumulates_and_the_pruner_with_it():
    """accelerate #963: what is called after `optimizer.step()` counted every micro-batch."""
    accelerate = pytest.importorskip("accelerate")
    want, got = pruner_of(), pruner_of()
    optimizer = torch.optim.AdamW(want.param_groups(1e-2, 0.1))
    for step in range(6):
        for part in range(4):
            backward(want, step, 4, part)
        optimizer.step()
        assert want.step()
        optimizer.zero_grad()

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
    model, optimizer = accelerator.prepare(got.model, torch.optim.AdamW(got.param_groups(1e-2, 0.1)))
    counted = []
    for step in range(6):
        for part in range(4):
            with accelerator.accumulate(model):
                rows = slice(part, part + 1)
                inputs = {name: value[rows] for name, value in batch(seed=step).items()}
                accelerator.backward(model(**inputs, labels=LABELS[rows]).loss)
                before = learned(got)
                optimizer.step()
                counted.append(got.step())
                if not counted[-1]:
                    assert torch.equal(learned(got), before)  # not even noise is drawn
                optimizer.zero_grad()
    assert counted == 6 * [False, False, False, True] and got.steps == want.steps == 6
    torch.testing.assert_close(learned(got), learned(want), rtol=1e-4, atol=1e-5)
    want.finalize(), got.finalize()
    assert got.plan() == want.plan()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("first", [True, False])
def test_accumulated_by_hand(own, first):
    """zero_grad before or after; an optimiser that was made without `param_groups` is found, too."""
    pruner = pruner_of()
    trained = [p for p in pruner.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained if own else pruner.param_groups(1e-2, 0.1), lr=1e-2)
    for step in range(3):
        if first:
            optimizer.zero_grad()
        for part in range(2):
            backward(pruner, step, 2, part)
            if part == 1:
                optimizer.step()
                if not first:
                    optimizer.zero_grad()
            assert pruner.step() == (part == 1) and pruner.steps == step + part


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scaler_leaves_out_is_none(fused, zeroed):
    """From the first step on, where scales are too large; a fused optimiser is called and skips by itself."""
    pruner = pruner_of()
    optimizer = torch.optim.AdamW(pruner.param_groups(1e-2, 0.1), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    overflows, counted = [True, False, False, True, True, False, False], []
    for step, overflow in enumerate(overflows):
        backward(pruner, step, scale=scaler.scale(torch.tensor(float("inf") if overflow else 1.0)))
        scaler.step(optimizer)
        scaler.update()
        if zeroed:
            optimizer.zero_grad()
        counted.append(pruner.step())
        optimizer.zero_grad()
    assert counted == [not overflow for overflow in overflows] and pruner.steps == 4
    assert bool(torch.isfinite(learned(pruner)).all())


class Plain:
    """No torch.optim.Optimizer: as old optimisers write, or in place."""

    def __init__(self, groups, through_data):
        self.parameters, self.through_data = [p for g in groups for p in g["params"]], through_data

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            if p.grad is not None and self.through_data:
                p.data.add_(p.grad, alpha=-1e-2)
            elif p.grad is not None:
                p.sub_(1e-2 * p.grad)


@pytest.mark.parametrize("through_data", [False, True])
def test_what_is_no_torch_optimiser_is_known_by_what_it_moves(through_data):
    pruner = pruner_of()
    optimizer = Plain(pruner.param_groups(), through_data)
    for step in range(4):
        for part in range(3):
            backward(pruner, step, 3, part)
            if part == 2:
                optimizer.step()
                pruner.model.zero_grad()
            assert pruner.step() == (part == 2) and pruner.steps == step + (part == 2)


def test_an_optimiser_of_copies():
    """Weights in 16 bits, their fp32 copies in the optimiser: no parameter of the model's is in it."""
    pruner = pruner_of()
    trained = [p for g in pruner.param_groups() for p in g["params"]]
    copies = [p.detach().clone().requires_grad_() for p in trained]
    optimizer = torch.optim.SGD(copies, lr=1e-2)
    for step in range(3):
        for part in range(2):
            backward(pruner, step, 2, part)
            if part == 1:
                for copy, p in zip(copies, trained, strict=True):
                    copy.grad = p.grad
                optimizer.step()
                for copy, p in zip(copies, trained, strict=True):
                    p.data.copy_(copy)
                pruner.model.zero_grad()
            assert pruner.step() == (part == 1)


def test_two_optimisers_make_one_step():
    pruner = pruner_of()
    optimizers = [torch.optim.SGD([group], lr=1e-2) for group in pruner.param_groups()]
    for step in range(3):
        backward(pruner, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert pruner.step() and pruner.steps == step + 1


def test_a_learning_rate_of_zero_is_a_step_and_another_models_is_none():
    pruner, other = pruner_of(), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(pruner.param_groups(0.0, 0.0))
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    backward(pruner, 0)
    other(torch.ones(2)).sum().backward()
    theirs.step()
    assert not pruner.step()
    optimizer.step()
    assert pruner.step() and pruner.steps == 1


def test_without_an_optimiser_every_call_is_a_step():
    gc.collect()
    pruner = pruner_of(warm_steps=5)
    for step in range(3):
        backward(pruner, step)
        assert pruner.step()
        pruner.model.zero_grad()
    assert pruner.step() and pruner.steps == 4


def test_a_compiled_optimiser():
    pruner = pruner_of()
    optimizer = torch.optim.AdamW(pruner.param_groups(1e-2, 0.1))
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        for part in range(2):
            backward(pruner, step, 2, part)
            if part == 1:
                compiled()
                optimizer.zero_grad()
            assert pruner.step() == (part == 1)


def test_a_pruner_that_is_gone_is_followed_no_more():
    pruner = pk.attach(build().train(), pk.PruneConfig(rank=4, sparsity=0.1))
    model, optimizer = pruner.model, torch.optim.SGD(pruner.param_groups())
    del pruner
    model(**batch(), labels=LABELS).loss.backward()
    optimizer.step()


def test_an_optimiser_whose_constructor_failed_is_passed_over():
    model = build("distilbert")
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3, warm_steps=5))
    left_over = torch.optim.AdamW.__new__(torch.optim.AdamW)  # as a traceback keeps it alive
    model.train()
    model(**batch()).logits.sum().backward()
    assert pruner.step() and not hasattr(left_over, "param_groups")
