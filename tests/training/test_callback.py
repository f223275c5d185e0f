"""PruneCallback: transformers' own Trainer does what PruneTrainer does, resumes anywhere, ends with the best that meets
the budget; a wrong optimiser is refused.
"""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

import prunekern as pk
import prunekern.hf  # noqa: F401  (from_pretrained of masked models)
from tests.helpers import tiny_modernbert, trainer_runs
from tests.helpers.callback_runs import STAGES, fresh
from tests.helpers.tiny_models import attached, batch, build, logits
from tests.helpers.trainer_runs import BOUNDARY, STEPS, Rows, Stop, arguments, result, same, stop_at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(trainer, result, folder) of a run never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = fresh(folder)
    trainer.train()
    return trainer, result(trainer), folder


def test_any_trainer_does_what_ours_does(whole, tmp_path):
    ours = trainer_runs.fresh(tmp_path)
    ours.train()
    trainer = whole[0]
    assert type(trainer) is Trainer
    same(whole[1], result(ours))
    assert trainer.pruning.report == ours.report and trainer.pruner.shrunk
    keys = ("loss", "sparsity", "flips", "learning_rate", "kept/ffn")
    logged = [[{k: entry.get(k) for k in keys} for entry in t.state.log_history] for t in (trainer, ours)]
    assert logged[0] == logged[1]
    assert logged[0][0]["kept/ffn"] == 1.0  # warm


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_run_resumes_at_any_step(step, whole, tmp_path):
    """Steps 2: noise is drawn; 4: masks learn; 6: the boundary itself; 8: channels are gone."""
    trainer = fresh(tmp_path)
    trainer.train(resume_from_checkpoint=str(whole[2] / f"checkpoint-{step}"))
    same(whole[1], result(trainer))
    assert trainer.pruner.steps == STEPS and trainer.pruning.report == whole[0].pruning.report


def test_a_run_that_is_killed_goes_on(whole, tmp_path):
    trainer = fresh(tmp_path)
    trainer.add_callback(stop_at(5))
    with pytest.raises(Stop):
        trainer.train()
    again = fresh(tmp_path)
    again.train(resume_from_checkpoint=True)
    same(whole[1], result(again))


@pytest.mark.parametrize("step", [4, 8])
def test_a_checkpoint_loads_as_a_masked_model(step, whole):
    """By transformers itself: the config says how it was attached, and what it has lost."""
    folder = whole[2] / f"checkpoint-{step}"
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "prunekern_masked" and ("shrunk" in said["pruner"]) == (step > BOUNDARY)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = fresh(folder.parent / "again")
    trainer._load_from_checkpoint(str(folder))
    assert pk.plan(model) == pk.plan(trainer.model)
    same(trainer.model.state_dict(), model.state_dict())
    inputs = batch(3)
    trainer.model.eval()
    # The same weights elsewhere in memory: PyTorch's products may sum in another order there.
    torch.testing.assert_close(logits(model.eval(), inputs), logits(trainer.model, inputs), rtol=1e-5, atol=1e-5)
    small = pk.compact(model)
    assert pk.plan(small) == pk.plan(model)


@pytest.mark.parametrize("step", [4, 8])
def test_a_model_whose_fused_linears_are_split(step, tmp_path):
    """ModernBERT: its checkpoints hold the parts, which adapters and kept channels belong to."""

    def made(folder):
        model = tiny_modernbert.build("sequence")
        pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.3))
        args = arguments(folder, save_steps=4)
        optimizers = (pk.optimizer(pruner, args), None)
        callbacks = [pk.PruneCallback(pruner, stage_one=0.6, warm=0.2, ramp=0.4)]
        return Trainer(model, args, train_dataset=Rows(), callbacks=callbacks, optimizers=optimizers)

    whole = made(tmp_path)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    again = made(tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    same(result(whole), result(again))
    loaded, masked = AutoModelForSequenceClassification.from_pretrained(checkpoint), made(tmp_path / "other")
    masked._load_from_checkpoint(str(checkpoint))
    same(masked.model.state_dict(), loaded.state_dict())


def test_accumulated_gradients_are_one_step(tmp_path):
    trainer = fresh(tmp_path, gradient_accumulation_steps=2, save_strategy="no", per_device_train_batch_size=2)
    trainer.train()
    assert trainer.pruner.steps == STEPS and trainer.pruner.sparsity() == pytest.approx(0.4, abs=0.02)


class _Scores:
    """A metric that gets worse at every evaluation: the first that counts is the best."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prediction):
        self.calls += 1
        return {"score": -self.calls}


def best_options(**more):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "score"}
    return options | {"greater_is_better": True, "load_best_model_at_end": True} | more


def test_the_best_model_is_one_that_meets_the_budget(tmp_path):
    options = {"eval_dataset": Rows(4), "compute_metrics": _Scores()}
    trainer = fresh(tmp_path, trainer_options=options, **best_options())
    trainer.train()
    assert trainer.state.best_global_step == BOUNDARY  # -1 and -2 were better, at steps 2 and 4
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{BOUNDARY}")
    again = fresh(tmp_path / "again")
    again._load_from_checkpoint(str(tmp_path / f"checkpoint-{BOUNDARY}"))
    same(result(again), result(trainer))
    assert pk.plan(trainer.model).sparsity() == pytest.approx(0.4, abs=0.02)


def test_the_best_model_of_prune_trainer(tmp_path):
    kept = {}

    def keep(step):
        kept[step] = result(trainer)

    options = {"eval_dataset": Rows(4), "compute_metrics": _Scores()}
    trainer = trainer_runs.fresh(tmp_path, [trainer_runs.Each(keep)], options, **best_options())
    trainer.train()
    assert trainer.state.best_global_step == BOUNDARY
    same(kept[BOUNDARY], result(trainer))


def test_early_stopping_ends_with_the_budget_met(tmp_path):
    options = {"eval_dataset": Rows(4), "compute_metrics": _Scores()}
    trainer = fresh(tmp_path, trainer_options=options, **best_options(load_best_model_at_end=False))
    trainer.args.load_best_model_at_end = True  # the callback asks for it; loading is not what is looked at here
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    with pytest.warns(UserWarning, match="PruneCallback: training ended at step 4, before stage one did"):
        trainer.train()
    assert trainer.pruner.finalized and pk.plan(trainer.model).sparsity() == pytest.approx(0.4, abs=0.02)


def test_seq2seq_trainer(tmp_path):
    """A Trainer of another kind, as its users build it."""
    model = build()
    pruner = attached(model, sparsity=0.4)
    defaults = arguments(tmp_path).to_dict()
    args = Seq2SeqTrainingArguments(**{k: defaults[k] for k in ("output_dir", "max_steps", "use_cpu", "report_to")})
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=Rows(),
        callbacks=[pk.PruneCallback(pruner, **STAGES)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()
    assert pk.plan(model).sparsity() == pytest.approx(0.4, abs=0.02)


def test_a_run_resumed_with_another_config(tmp_path):
    trainer = fresh(tmp_path)
    trainer.add_callback(stop_at(5))
    with pytest.raises(Stop):
        trainer.train()
    again = fresh(tmp_path, config={"sparsity": 0.2})
    with pytest.raises(ValueError, match="checkpoint-4/config.json was trained with sparsity=0.4, this run has sparsi"):
        again.train(resume_from_checkpoint=True)


# -- refusals --------------------------------------------------------------------------------------------------


def trainer_with(optimizers, tmp_path, model=None):
    model = build() if model is None else model
    pruner = attached(model, sparsity=0.4)
    made = optimizers(model, pruner)
    callbacks = [pk.PruneCallback(pruner)]
    return Trainer(model, arguments(tmp_path), train_dataset=Rows(), callbacks=callbacks, optimizers=(made, None))


def test_without_its_optimizer(tmp_path):
    trainer = trainer_with(lambda model, pruner: None, tmp_path)
    with pytest.raises(ValueError, match=r"mask logits must have a group of their own; build the optimizer by prunek"):
        trainer.train()


def test_an_optimizer_of_before(tmp_path):
    model = build()
    before = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = trainer_with(lambda *_: before, tmp_path, model)
    with pytest.raises(
        ValueError, match=r"must hold the mask logits \(those of '.*' are missing\): it was built before"
    ):
        trainer.train()


def test_an_optimizer_that_leaves_something_out(tmp_path):
    def some(model, pruner):
        groups = pruner.param_groups()
        groups[0]["params"] = groups[0]["params"][1:]
        return torch.optim.AdamW(groups)

    with pytest.raises(ValueError, match=r"must hold every trainable parameter \('.*' is missing\)"):
        trainer_with(some, tmp_path).train()


def test_another_model(tmp_path):
    callbacks = [pk.PruneCallback(attached(build()))]
    with pytest.raises(ValueError, match="PruneCallback: model must be the one that pruner was attached to, or hold"):
        Trainer(build(), arguments(tmp_path), train_dataset=Rows(), callbacks=callbacks)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"stage_one": 0.0}, ValueError, r"PruneCallback: stage_one must be in \(0, 1\] \(got 0.0\)"),
        ({"ramp": 2}, ValueError, r"PruneCallback: ramp must be in \(0, 1\] \(got 2\)"),
        ({"warm": 1.0}, ValueError, r"PruneCallback: warm must be in \[0, 1\) \(got 1.0\)"),
        ({"rule": "best"}, ValueError, "rule must be one of"),
        ({"distil": "heads"}, ValueError, r"Distillation: on must be one of \('logits', 'hidden'\) \(got 'heads'\)"),
        ({"distil": 3}, TypeError, "distil must be 'logits', 'hidden', a Distillation or a DistilLoss"),
        ({"distil": "logits", "shrink": True}, ValueError, "shrink must be False with distil"),
    ],
)
def test_what_is_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        pk.PruneCallback(attached(build()), **options)


def test_no_pruner():
    with pytest.raises(TypeError, match="PruneCallback: pruner must be what prunekern.attach returned"):
        pk.PruneCallback(build())
