"""PruneTrainer: two stages, the budget met, a run stopped anywhere and resumed ends with the same bits."""

import json
import shutil
import sys
import warnings

import pytest
import torch
from transformers import TrainerCallback

import prunekern as pk
from prunekern.pruning import attach as attach_file
from prunekern.training import arguments as arguments_file
from prunekern.training.trainer import last_checkpoint
from tests.helpers.tiny_models import FFN, attached, batch, build, difference, logits, names
from tests.helpers.trainer_runs import BOUNDARY, STEPS, Each, Rows, Stop, arguments, fresh, result, same, stop_at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: what the others are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = fresh(folder)
    trainer.train()
    return trainer, result(trainer), folder


# -- the two stages --------------------------------------------------------------------------------------------


def test_meets_the_budget_and_reports(whole):
    trainer, _, _ = whole
    report = trainer.report
    assert report["target"] == 0.4 and trainer.pruner.finalized
    assert 0.4 <= report["sparsity"] == pk.plan(trainer.model).sparsity() < 0.43
    small = pk.compact(trainer.model)
    assert difference(logits(small, batch()), logits(trainer.model.eval(), batch())) <= 1e-4


def test_masks_are_final_at_the_boundary_and_stay(tmp_path):
    seen = {}

    def watch(step):
        pruner = trainer.pruner
        kept = torch.cat([m.kept() for m in pruner.masks.values()])
        adapters = next(iter(pruner.layers.values())).A.detach().clone()
        seen[step] = pruner.finalized, kept, adapters, pruner.expected_sparsity(), pruner.target()

    trainer = fresh(tmp_path, save_strategy="no")
    trainer.add_callback(Each(watch))
    trainer.train()
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert [seen[s][0] for s in sorted(seen)] == [s >= BOUNDARY for s in sorted(seen)]
    for step in range(BOUNDARY + 1, STEPS + 1):
        assert torch.equal(seen[step][1], seen[BOUNDARY][1])
        assert not torch.equal(seen[step][2], seen[step - 1][2])  # adapters go on learning
    for step in range(1, BOUNDARY):  # of stage one, a fifth (one step) is warm, two fifths (two steps) are the ramp
        assert seen[step][4] == pytest.approx(0.4 * min(1, (step - 1) / 2))
        assert seen[step][3] == pytest.approx(seen[step][4], abs=1e-5)


def test_learning_rates_of_both_stages_and_warmup(tmp_path):
    rates = []
    trainer = fresh(tmp_path, save_strategy="no", warmup_steps=2)

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):  # what this step is taken with
            rates.append({g["name"]: g["lr"] for g in trainer.optimizer.param_groups})

    trainer.add_callback(Rates())
    trainer.train()
    want = [1 / 3, 2 / 3] + [1.0] * (BOUNDARY - 2)
    assert [r["adapters"] for r in rates] == pytest.approx([w * 1e-2 for w in want] + [1e-3] * (STEPS - BOUNDARY))
    assert [r["masks"] for r in rates] == pytest.approx([w * 0.1 for w in want] + [0.0] * (STEPS - BOUNDARY))


def test_the_learning_rate_falls_linearly_to_zero(tmp_path):
    rates = []
    trainer = fresh(tmp_path, save_strategy="no", trainer_options={"final_learning_rate": None}, warmup_steps=1)

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            rates.append({g["name"]: g["lr"] for g in trainer.optimizer.param_groups})

    trainer.add_callback(Rates())
    trainer.train()
    assert [r["adapters"] for r in rates] == pytest.approx([0.5e-2] + [1e-2 * (1 - s / STEPS) for s in range(1, STEPS)])
    assert [r["masks"] for r in rates] == pytest.approx([0.05] + [0.1] * (BOUNDARY - 1) + [0.0] * (STEPS - BOUNDARY))


def test_the_paper_preset_keeps_to_the_paper(tmp_path):
    pruner = pk.attach(build(), pk.PruneConfig(preset="paper", rank=4, sparsity=0.1))
    assert pruner.config.warm_steps == 0 and not pruner.warm
    trainer = pk.PruneTrainer(args=arguments(tmp_path, learning_rate=5e-5), pruner=pruner, train_dataset=Rows())
    assert trainer.final_learning_rate == 1e-5 and trainer.warm == 0 and trainer.stage_one == 0.6
    assert pk.PruneConfig(preset="paper", warm_steps=7).warm_steps == 7 and pk.PruneConfig().warm_steps == 100


def test_defaults(tmp_path):
    model = build()
    trainer = pk.PruneTrainer(
        args=arguments(tmp_path, learning_rate=5e-5), pruner=attached(model), train_dataset=Rows()
    )
    assert trainer.model is model and trainer.final_learning_rate is None
    trainer.create_optimizer()
    groups = {g["name"]: g for g in trainer.optimizer.param_groups}
    assert groups["masks"]["weight_decay"] == 0 and groups["masks"]["lr"] == 5e-2


def test_logs_contain_sparsity(whole):
    trainer, _, _ = whole
    logged = {e["step"]: e["sparsity"] for e in trainer.state.log_history if "loss" in e}
    assert sorted(logged) == list(range(1, STEPS + 1))
    assert logged[1] == 0 and logged[2] == pytest.approx(0.2, abs=1e-4) and logged[3] == pytest.approx(0.4, abs=1e-4)
    assert all(logged[s] == pytest.approx(trainer.report["sparsity"], abs=1e-6) for s in range(BOUNDARY, STEPS + 1))


def test_evaluation_logs_contain_sparsity_too(tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4}
    trainer = fresh(tmp_path, save_strategy="no", trainer_options={"eval_dataset": Rows(8)}, **evaluation)
    trainer.train()
    entries = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert entries and all("sparsity" in e for e in entries)


def test_equals_a_plain_loop(tmp_path):
    """The same batches, optimiser and schedule by hand, dropout off: the same bits, so the trainer adds nothing."""
    off = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    trainer = fresh(tmp_path, save_strategy="no", model_options=off, train_sampling_strategy="sequential")
    for layer in trainer.pruner.layers.values():
        layer.dropout.p = 0.0
    trainer.train()

    model = build(**off)
    pruner = attached(model, sparsity=0.4, warm_steps=1, ramp_steps=2)
    optimizer = torch.optim.AdamW(pruner.param_groups(1e-2, 0.1))
    rows, (adapters, masks) = Rows(), optimizer.param_groups
    model.train()
    for step in range(STEPS):
        adapters["lr"], masks["lr"] = (1e-2, 0.1) if step < BOUNDARY else (1e-3, 0.0)
        picked = [rows[(4 * step + i) % len(rows)] for i in range(4)]
        inputs = {k: torch.stack([torch.as_tensor(r[k]) for r in picked]) for k in picked[0]}
        optimizer.zero_grad()
        (model(**inputs).loss + pruner.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
        if step + 1 == BOUNDARY:
            pruner.finalize()
            pruner.shrink(optimizer)
    assert pruner.plan() == trainer.pruner.plan()
    assert pruner.sparsity() >= 0.4
    ours = model.state_dict()
    for name, theirs in result(trainer).items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_gradient_accumulation_counts_optimiser_steps(tmp_path):
    trainer = fresh(tmp_path, save_strategy="no", gradient_accumulation_steps=3, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.pruner.steps == STEPS and trainer.report["sparsity"] >= 0.4


def test_gradient_checkpointing(tmp_path):
    trainer = fresh(
        tmp_path,
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    trainer.train()
    assert trainer.report["sparsity"] >= 0.4


def test_stage_one_to_the_end(tmp_path):
    trainer = fresh(tmp_path, save_strategy="no", trainer_options={"stage_one": 1.0})
    trainer.train()
    assert trainer.pruner.finalized and trainer.report["sparsity"] >= 0.4


# -- stopped and resumed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5, BOUNDARY, 7, 9, STEPS])
def test_resumed_run_ends_with_the_same_bits(step, whole, tmp_path):
    """Stopped by an exception in a callback, in stage one, at the boundary and in stage two; dropout is on."""
    _, want, _ = whole
    first = fresh(tmp_path, [stop_at(step)])
    with pytest.raises(Stop):
        first.train()
    # A new process would start from the dense weights and a random state of its own.
    torch.manual_seed(999)
    second = fresh(tmp_path)
    if step <= 2:  # nothing was saved yet
        with pytest.raises(FileNotFoundError, match="resume_from_checkpoint: no complete checkpoint in"):
            second.train(resume_from_checkpoint=True)
        return
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == STEPS
    same(result(second), want)
    assert second.pruner.plan() == whole[0].pruner.plan() and second.report == whole[0].report


def test_resume_from_a_named_checkpoint(whole, tmp_path):
    _, want, folder = whole
    for step in (2, 6, 8):
        trainer = fresh(tmp_path / str(step))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        same(result(trainer), want)


@pytest.mark.slow
def test_killed_by_the_system_and_resumed(whole, tmp_path):
    """SIGKILL in a child while the weights of step 8 are being written: resumes from step 6."""
    import os
    import signal
    import subprocess
    from pathlib import Path

    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from prunekern.training import trainer as module
from tests.training.test_trainer import fresh
real, saves = module.save_adapter, []
def save_adapter(pruner, path):
    saves.append(path)
    if len(saves) == 4:
        os.makedirs(path, exist_ok=True)
        open(os.path.join(path, "adapter.safetensors"), "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(pruner, path)
module.save_adapter = save_adapter
fresh({str(tmp_path)!r}).train()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "checkpoint-8" in os.listdir(tmp_path)
    assert last_checkpoint(tmp_path).name == "checkpoint-6"
    trainer = fresh(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    same(result(trainer), whole[1])


def test_incomplete_newest_checkpoints_are_skipped(whole, tmp_path):
    shutil.copytree(whole[2], tmp_path / "run")
    folder = tmp_path / "run"
    assert last_checkpoint(folder).name == "checkpoint-10"
    (folder / "checkpoint-10" / "trainer_state.json").write_text('{"half')
    assert last_checkpoint(folder).name == "checkpoint-8"
    (folder / "checkpoint-8" / "trainer_state.json").unlink()
    (folder / "checkpoint-99").mkdir()
    (folder / "checkpoint-best").mkdir()
    assert last_checkpoint(folder).name == "checkpoint-6"
    weights = folder / "checkpoint-6" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert last_checkpoint(folder).name == "checkpoint-4"
    weights.unlink()
    assert last_checkpoint(folder).name == "checkpoint-4"
    trainer = fresh(folder)
    trainer.train(resume_from_checkpoint=True)
    same(result(trainer), whole[1])
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_checkpoints_hold_the_adapter_not_the_model(whole):
    trainer, want, folder = whole
    files = {p.name for p in (folder / "checkpoint-10").iterdir()}
    assert {"adapter.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= files
    assert not [f for f in files if f.startswith(("model", "pytorch_model"))]
    dense = build(dropout=0.1, attention_dropout=0.1, seq_classif_dropout=0.1)
    pruner = pk.load_adapter(dense, folder / "checkpoint-10")
    same({n: t for n, t in dense.state_dict().items()}, want)
    assert pruner.finalized and pruner.steps == STEPS


def test_checkpoint_of_another_run_is_refused(whole, tmp_path):
    trainer = fresh(tmp_path, model_options={"hidden_dim": FFN + 8})
    before = result(trainer)
    with pytest.raises(ValueError, match="must have shape"):
        trainer.train(resume_from_checkpoint=str(whole[2] / "checkpoint-4"))
    same(result(trainer), before)


def test_save_model_writes_an_adapter(whole, tmp_path):
    whole[0].save_model(str(tmp_path / "out"))
    dense = build(dropout=0.1, attention_dropout=0.1, seq_classif_dropout=0.1)
    pk.load_adapter(dense, tmp_path / "out")
    same(dense.state_dict(), whole[1])


# -- a loss that is not finite ---------------------------------------------------------------------------------


def nan_at(trainer, step, monkeypatch, value=float("nan")):
    real = type(trainer).compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = real(self, model, inputs, *args, **kwargs)
        return loss * value if self.state.global_step + 1 == step else loss

    monkeypatch.setattr(type(trainer), "compute_loss", compute_loss)


@pytest.mark.parametrize("step,value", [(5, float("nan")), (9, float("inf"))])
def test_nan_loss_stops_and_the_last_checkpoint_is_good(step, value, whole, tmp_path, monkeypatch):
    trainer = fresh(tmp_path, save_steps=1)
    nan_at(trainer, step, monkeypatch, value)
    with pytest.raises(
        FloatingPointError, match=rf"loss is (nan|-?inf) at step {step}; training stops, weights are those"
    ):
        trainer.train()
    assert all(torch.isfinite(t).all() for t in trainer.model.state_dict().values() if t.is_floating_point())
    assert last_checkpoint(tmp_path).name == f"checkpoint-{step - 1}"
    monkeypatch.undo()
    again = fresh(tmp_path)
    again.train(resume_from_checkpoint=True)
    same(result(again), whole[1])


def test_nan_gradient_stops_before_the_weights_are_touched(tmp_path):
    """The loss is finite, its gradient is not: as sqrt at zero. With clipping, one NaN would reach every weight."""
    trainer = fresh(tmp_path, save_steps=1)
    weight = trainer.model.classifier.weight
    weight.register_hook(lambda g: g * float("nan") if trainer.state.global_step == 4 else g)
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 5; training stops"):
        trainer.train()
    assert all(torch.isfinite(t).all() for t in trainer.model.state_dict().values() if t.is_floating_point())
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stage_one": 0.0}, r"PruneTrainer: stage_one must be in \(0, 1\] \(got 0.0\)"),
        ({"stage_one": 1.5}, r"PruneTrainer: stage_one must be in \(0, 1\] \(got 1.5\)"),
        ({"warm": 1.0}, r"PruneTrainer: warm must be in \[0, 1\) \(got 1.0\)"),
        ({"ramp": -1.0}, r"PruneTrainer: ramp must be in \(0, 1\] \(got -1.0\)"),
        ({"ramp": float("nan")}, r"PruneTrainer: ramp must be in \(0, 1\] \(got nan\)"),
    ],
)
def test_stages_out_of_range(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fresh(tmp_path, trainer_options=options)


def test_model_of_another_pruner_is_refused(tmp_path):
    with pytest.raises(ValueError, match="PruneTrainer: model must be the one that pruner was attached to"):
        pk.PruneTrainer(build(), arguments(tmp_path), pruner=attached(build()))


def test_bf16_on_a_cpu_where_it_crashes(tmp_path, monkeypatch):
    """The process would die with an illegal instruction in the middle of the first step."""
    for module in (attach_file, arguments_file):
        monkeypatch.setattr(module, "bf16_matmul_crashes", lambda: True)
    with pytest.raises(RuntimeError, match="PruneTrainer: bf16 must be False: .*Train in fp32"):
        fresh(tmp_path, bf16=True)


def test_trains_without_warnings_of_ours(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh(tmp_path, save_strategy="no", max_steps=2).train()
    assert not [w for w in caught if "prunekern" in str(w.filename)]


def test_state_on_disk_says_where_the_run_stands(whole):
    config = json.loads((whole[2] / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["pruner"] == {"steps": 4, "warm_steps": 1, "ramp_steps": 2}
    assert config["architecture"] == "DistilBertForSequenceClassification"
    assert config["prune_config"]["sparsity"] == 0.4
    assert names("distilbert")["q"].startswith("distilbert.")
