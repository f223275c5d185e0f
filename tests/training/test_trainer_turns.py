"""PruneTrainer where a run takes another turn: started or resumed again, with other settings, with what is not ours."""

import pytest
import torch
from transformers.optimization import Adafactor

import prunekern as pk
from tests.helpers.tiny_models import attached, build
from tests.helpers.trainer_runs import STEPS, Each, Rows, Stop, arguments, fresh, result, same, stop_at


def test_a_finished_run_resumed_again_and_again_stays_as_it_is(tmp_path):
    trainer = fresh(tmp_path)
    trainer.train()
    for _ in range(3):
        again = fresh(tmp_path)
        again.train(resume_from_checkpoint=True)
        same(result(again), result(trainer))
        assert again.state.global_step == STEPS and again.report == trainer.report
    longer = fresh(tmp_path, max_steps=STEPS + 2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == STEPS + 2


@pytest.mark.parametrize("step", (4, 8))
def test_rows_grouped_by_length_come_in_the_same_order_after_a_resume(step, tmp_path):
    """An epoch has 6 steps: step 8 is in the second, whose order a checkpoint does not hold."""
    options = {"train_sampling_strategy": "group_by_length"}
    whole = fresh(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Stop):
        fresh(tmp_path / "stopped", callbacks=[stop_at(step + 1)], **options).train()
    again = fresh(tmp_path / "stopped", **options)
    again.train(resume_from_checkpoint=True)
    same(result(again), result(whole))
    sampler = again._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(len(sampler)))


def test_learning_rates_are_never_negative(tmp_path):
    trainer = fresh(tmp_path, save_strategy="no")
    trainer.final_learning_rate = None
    trainer.create_optimizer_and_scheduler(STEPS)
    for step in range(STEPS + 3):
        assert all(rate >= 0 for rate in trainer.lr_scheduler.get_last_lr()), step
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


@pytest.mark.parametrize("changes", ({"sparsity": 0.2}, {"alpha": 4.0}, {"seed": 5}))
def test_a_checkpoint_of_another_config_is_refused(changes, tmp_path):
    fresh(tmp_path).train()
    other = attached(build(), **{"sparsity": 0.4, "dropout": 0.1} | changes)
    trainer = pk.PruneTrainer(args=arguments(tmp_path), pruner=other, train_dataset=Rows())
    before, (name,) = result(trainer), changes
    with pytest.raises(ValueError, match=rf"checkpoint-{STEPS}: was trained with {name}=.* this run has {name}="):
        trainer.train(resume_from_checkpoint=True)
    same(result(trainer), before)


def test_resumed_for_fewer_steps_the_logits_start_from_what_was_gathered(tmp_path):
    options = {"trainer_options": {"warm": 0.6}}
    with pytest.raises(Stop):
        fresh(tmp_path, callbacks=[stop_at(9)], max_steps=40, save_steps=1, **options).train()  # of 14 warm steps
    trainer = fresh(tmp_path, max_steps=14, **options)  # 5 warm steps, which are over
    spread = []
    trainer.add_callback(Each(lambda step: spread.append(_spread(trainer.pruner))))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.pruner.finalized and spread[0] > 1  # in standard deviations of the noise; flat: 0.2


def _spread(pruner):
    return float(torch.cat([mask.logits.detach() for mask in pruner.masks.values()]).std())


def test_a_run_that_starts_anew_after_an_interrupt_is_warm_again(tmp_path):
    trainer = fresh(tmp_path, callbacks=[stop_at(2)], trainer_options={"warm": 0.6}, save_strategy="no")  # 4 steps
    with pytest.raises(Stop):
        trainer.train()
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Each)]
    warm = []
    trainer.add_callback(Each(lambda step: warm.append(trainer.pruner.warm)))
    trainer.train()
    assert warm == [True] * 3 + [False] * (STEPS - 3) and trainer.pruner.steps == STEPS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "lerned"}, r"rule must be one of .* \(got 'lerned'\)"),
        ({"rule": "uniform", "criterion": "magnitud"}, r"criterion must be one of .* \(got 'magnitud'\)"),
    ],
)
def test_what_finalize_would_refuse_is_refused_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fresh(tmp_path, trainer_options=options)
    fresh(tmp_path, trainer_options={"rule": "uniform", "criterion": "saliency"})  # there will be some


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"one process must have one GPU \(got 2\): start it by torchrun"):
        pk.PruneTrainer(args=args, pruner=attached(build()), train_dataset=Rows())


@pytest.mark.parametrize("named", (False, True))
def test_an_optimiser_of_ones_own(named, tmp_path):
    model = build()
    pruner = attached(model, sparsity=0.4)
    groups = pruner.param_groups(1e-3, 0.1)
    if not named:
        groups = [{k: v for k, v in group.items() if k != "name"} for group in groups]
    own = torch.optim.AdamW(groups)
    args = arguments(tmp_path, save_strategy="no")
    trainer = pk.PruneTrainer(args=args, pruner=pruner, train_dataset=Rows(), optimizers=(own, None), stage_one=0.6)
    trainer.train()
    assert pruner.finalized and trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_an_optimiser_with_masks_and_adapters_in_one_group_is_refused(tmp_path):
    pruner = attached(build(), sparsity=0.4)
    own = torch.optim.AdamW(p for p in pruner.model.parameters() if p.requires_grad)
    trainer = pk.PruneTrainer(
        args=arguments(tmp_path, save_strategy="no"), pruner=pruner, train_dataset=Rows(), optimizers=(own, None)
    )
    with pytest.raises(
        ValueError, match=r"mask logits must have a group of their own; build the optimizer by prunekern"
    ):
        trainer.train()


def test_adafactor_goes_on_over_the_boundary(tmp_path):
    trainer = fresh(tmp_path, optim="adafactor", save_strategy="no")
    trainer.train()
    assert trainer.pruner.shrunk and trainer.state.global_step == STEPS
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, Adafactor)
