"""A run that ends before its steps are taken: the budget is met all the same, and a warning says what is missing."""

import warnings

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

import prunekern as pk
from tests.helpers.tiny_models import attached, batch, build, difference, logits
from tests.helpers.trainer_runs import STEPS, Each, Rows, fresh, result, same


class End(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("shrink", [False, True])
def test_a_run_ended_in_stage_one_meets_the_budget(step, shrink, tmp_path):
    """While warm, on the ramp, at the full target. sentence-transformers #3842: nothing pruned, without a word."""
    trainer = fresh(tmp_path, [End(step)], {"shrink": shrink}, save_strategy="no")
    message = rf"ended at step {step}, before stage one did \(step 6 of 10\): .* remove 0.4 of .*stage two did not take"
    with pytest.warns(UserWarning, match=message):
        trainer.train()
    assert trainer.state.global_step == step
    assert trainer.pruner.finalized and trainer.pruner.shrunk == shrink and trainer.report["sparsity"] >= 0.4
    small = pk.compact(trainer.model)
    assert pk.plan(small).sparsity() == trainer.report["sparsity"]
    assert difference(logits(small, batch()), logits(trainer.model.eval(), batch())) <= 1e-4


def test_early_stopping(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
    patience = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    trainer = fresh(tmp_path, [patience], {"eval_dataset": Rows(8)}, save_strategy="no", **options)
    with pytest.warns(UserWarning, match="stage two did not take place"):
        trainer.train()
    assert trainer.state.global_step < 6 and pk.plan(pk.compact(trainer.model)).sparsity() >= 0.4


def test_in_stage_two_nothing_is_said(tmp_path):
    trainer = fresh(tmp_path, [End(8)], save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.pruner.finalized and trainer.state.global_step == 8


def test_resumed_after_it_was_ended_as_one_that_was_not(tmp_path):
    whole = fresh(tmp_path / "whole")
    whole.train()
    with pytest.warns(UserWarning, match="stage two did not take place"):
        fresh(tmp_path / "cut", [End(4)]).train()
    again = fresh(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    same(result(again), result(whole))


def test_a_step_that_a_loss_scaler_left_out_counts_after_a_resume_neither(tmp_path):
    """Trainer counts it: the pruner's steps are those of the checkpoint, not Trainer's."""
    trainer = fresh(tmp_path)
    skipped = []

    def skip(number):
        accelerated = trainer.optimizer
        if number == 2 and not skipped:
            skipped.append(accelerated.step)
            accelerated.step = lambda closure=None: None
        elif number == 3:
            accelerated.step = skipped[0]

    trainer.add_callback(Each(skip))
    trainer.train()
    assert trainer.state.global_step == STEPS and trainer.pruner.steps == STEPS - 1
    again = fresh(tmp_path)
    counts = []
    again.add_callback(Each(lambda number: counts.append(again.pruner.steps)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert counts == list(range(4, STEPS))
    same(result(again), result(trainer))


def test_a_loop_of_ones_own_that_ends_before_is_told_at_compact():
    pruner = attached(build().train(), sparsity=0.4, warm_steps=50)
    optimizer = torch.optim.AdamW(pruner.param_groups())
    for step in range(3):
        pruner.model(**batch(seed=step), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    with pytest.warns(
        UserWarning, match="compact: the masks are not final, and remove 0 of the block params where 0.4"
    ):
        pk.compact(pruner.model)
    pruner.finalize()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert pk.plan(pk.compact(pruner.model)).sparsity() >= 0.4
