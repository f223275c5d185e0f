"""Every field of TrainingArguments is honoured or refused by name; what passes through our overrides has its effect."""

import math
from dataclasses import fields

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import prunekern as pk
from prunekern.training import arguments as table
from prunekern.training.arguments import check_arguments
from tests.helpers.tiny_models import attached, build
from tests.helpers.trainer_runs import BOUNDARY, STEPS, Rows, arguments, fresh, result, same

NO_FINAL = {"final_learning_rate": None}


def test_every_field_is_decided():
    """A new field of a new transformers: decide, and write it into the table that it belongs to."""
    tables = [table.OURS, table.TRAINERS, set(table.BELONGING), set(table.REFUSED)]
    names = {field.name for field in fields(TrainingArguments)}
    assert names - set().union(*tables) == set()
    for i, one in enumerate(tables):
        assert not any(one & other for other in tables[i + 1 :])
    assert set(table.BELONGING.values()) <= set(table.REFUSED)


@pytest.mark.parametrize("name", table.REFUSED)
def test_refused_by_name(name, tmp_path):
    args = arguments(tmp_path)
    check_arguments(args, None)
    setattr(args, name, "something")  # transformers itself refuses some of these where their packages are not
    with pytest.raises(ValueError, match=rf"PruneTrainer: {name} must be .* \(got 'something'\): "):
        check_arguments(args, None)


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw_layerwise", "lomo", "adalomo", "schedule_free_adamw"])
def test_optimisers_that_choose_parameters_themselves_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"PruneTrainer: optim must not be '{optim}': "):
        fresh(tmp_path, optim=optim)


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_reentrant_checkpointing_is_refused(name, tmp_path):
    """Behind frozen embeddings no gradient reaches a block."""
    with pytest.raises(ValueError, match="checkpointing_kwargs must not have use_reentrant"):
        fresh(tmp_path, **{name.removesuffix("_kwargs"): True, name: {"use_reentrant": True}})


def test_a_loss_of_ones_own_and_another(tmp_path):
    def objective(model, inputs):
        return model(**inputs).loss

    with pytest.raises(ValueError, match="label_smoothing_factor must be 0 with an objective"):
        fresh(tmp_path, trainer_options={"objective": objective}, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func must be None with an objective"):
        fresh(tmp_path, trainer_options={"objective": objective, "compute_loss_func": lambda *a, **k: None})


# -- learning rates ----------------------------------------------------------------------------------------------


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append({g.get("name"): g["lr"] for g in optimizer.param_groups})


def cosine(step, warmup, cycles=0.5):
    if step < warmup:
        return step / warmup
    return max(0.0, 0.5 * (1 + math.cos(math.pi * cycles * 2 * (step - warmup) / (STEPS - warmup))))


@pytest.mark.parametrize(
    "kind, kwargs, warmup, want",
    [
        ("cosine", None, 2, lambda s: cosine(s, 2)),
        ("cosine", {"num_cycles": 1.0}, 0, lambda s: cosine(s, 0, 1.0)),
        ("constant", None, 0, lambda s: 1.0),
        ("constant_with_warmup", None, 4, lambda s: min(1.0, s / 4)),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}, 0, lambda s: (1 - s / STEPS) ** 2),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 0, lambda s: cosine(s, 0) * 0.9 + 0.1),
        ("inverse_sqrt", {"timescale": 4}, 0, lambda s: (4 / (s + 4)) ** 0.5),
    ],
)
def test_the_adapters_follow_lr_scheduler_type(kind, kwargs, warmup, want, tmp_path):
    """By their definitions; mask logits keep their own rate until they are final."""
    rates = Rates()
    options = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup}
    fresh(tmp_path, [rates], NO_FINAL, save_strategy="no", **options).train()
    assert [r["adapters"] for r in rates.seen] == pytest.approx([1e-2 * want(s) for s in range(STEPS)])
    masks = [0.1 * min(1.0, (s + 1) / (warmup + 1)) for s in range(BOUNDARY)] + [0.0] * (STEPS - BOUNDARY)
    assert [r["masks"] for r in rates.seen] == pytest.approx(masks)


def test_a_cosine_run_resumed_ends_with_the_same_bits(tmp_path):
    options = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "warmup_steps": 2}
    whole = fresh(tmp_path / "whole", trainer_options=NO_FINAL, **options)
    whole.train()
    for step in (4, 8):
        again = fresh(tmp_path / str(step), trainer_options=NO_FINAL, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        same(result(again), result(whole))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type must be 'linear'.*with a final_learning_rate.*got 'cosin"),
        ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_type must be 'linear', without lr_scheduler_kwargs, with a "),
    ],
)
def test_a_schedule_with_a_final_learning_rate_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fresh(tmp_path, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "lr_scheduler_type must not be one o",
        ),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, r"must not be one of .* \(got 'greedy'\)"),
        ({"lr_scheduler_kwargs": {"power": 2}}, r"lr_scheduler_kwargs must fit lr_scheduler_type 'linear' \(got {'pow"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs must fit lr_scheduler_type 'warmup_stable"),
    ],
)
def test_schedules_that_cannot_be_are_refused_before_training(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fresh(tmp_path, trainer_options=NO_FINAL, **options)


def test_a_schedule_goes_before_the_papers_final_rate(tmp_path):
    pruner = pk.attach(build(), pk.PruneConfig(preset="paper", rank=4, sparsity=0.1))
    args = arguments(tmp_path, lr_scheduler_type="cosine")
    assert pk.PruneTrainer(args=args, pruner=pruner, train_dataset=Rows()).final_learning_rate is None


# -- the optimiser -----------------------------------------------------------------------------------------------


def test_weight_decay_spares_biases_norms_and_logits(tmp_path):
    """As Trainer does: its documentation of weight_decay says so."""
    trainer = fresh(tmp_path, weight_decay=0.1)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(decay) == trained and decay["classifier.weight"] == 0.1
    assert {name for name, d in decay.items() if not d} == {n for n in trained if n.endswith(("bias", "mask.logits"))}
    trainer.train()
    assert trainer.pruner.finalized


def test_betas_optim_and_its_arguments(tmp_path):
    trainer = fresh(tmp_path, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3, optim="adamw_torch")
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    for group in trainer.optimizer.param_groups:
        assert group["betas"] == (0.5, 0.6) and group["eps"] == 1e-3
    trainer = fresh(tmp_path, optim="rmsprop", optim_args="alpha=0.5")
    assert {g["alpha"] for g in trainer.create_optimizer().param_groups} == {0.5}


def test_an_optimiser_class_of_ones_own(tmp_path):
    own = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.5})}
    trainer = fresh(tmp_path, trainer_options=own, save_strategy="no")
    assert type(trainer.create_optimizer()) is torch.optim.SGD
    assert {g["momentum"] for g in trainer.optimizer.param_groups} == {0.5}
    trainer.train()
    assert trainer.pruner.finalized
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs must be a class that takes parameter groups"):
        bad = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3, "params": []})}
        fresh(tmp_path, trainer_options=bad).create_optimizer()


# -- by their effect ---------------------------------------------------------------------------------------------


def losses(folder, **options):
    trainer = fresh(folder, save_strategy="no", model_options={"dropout": 0.0}, **options)
    trainer.train()
    assert trainer.pruner.steps == STEPS and trainer.report["sparsity"] >= 0.4
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    "options, is_same",
    [
        ({"label_smoothing_factor": 0.3}, False),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"max_grad_norm": 1e-4}, False),
        ({"data_seed": 3}, False),
        ({"train_sampling_strategy": "batch_rebalance"}, False),
        ({"activation_checkpointing": True}, True),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, True),
        ({"accelerator_config": {"split_batches": True}}, True),
        ({"full_determinism": True}, True),
    ],
)
def test_arguments_that_touch_a_step(options, is_same, tmp_path):
    """Same losses where an argument changes how, other ones where it changes what is computed."""
    plain, changed = losses(tmp_path), losses(tmp_path, **options)
    try:
        assert torch.allclose(plain, changed, rtol=1e-3) == is_same
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(torch.isfinite(changed).all())


def test_label_smoothing_is_that_of_the_definition(tmp_path):
    trainer = fresh(tmp_path, label_smoothing_factor=0.3)
    rows = [Rows()[i] for i in range(4)]
    inputs = {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
    trainer.model.eval()
    want = torch.nn.functional.cross_entropy(trainer.model(**inputs).logits, inputs["labels"], label_smoothing=0.3)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(inputs)), want)


def test_a_smaller_batch_after_memory_ran_out(tmp_path, monkeypatch):
    trainer = fresh(tmp_path, save_strategy="no", auto_find_batch_size=True)
    real, sizes = type(trainer).compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["labels"]))
        if sizes[-1] > 3:
            raise RuntimeError("CUDA out of memory.")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "compute_loss", compute_loss)
    trainer.train()
    assert sizes[0] == 4 and set(sizes[1:]) <= {1, 2, 3}
    assert trainer.pruner.steps == STEPS and trainer.report["sparsity"] >= 0.4


@pytest.mark.slow
def test_a_compiled_model_goes_on_over_the_boundary_shrunk(tmp_path):
    trainer = fresh(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert trainer.pruner.shrunk
    assert not any("_orig_mod" in name for name in trainer.pruner.plan().layers)
    pk.load_adapter(build(dropout=0.1, attention_dropout=0.1, seq_classif_dropout=0.1), tmp_path / "checkpoint-10")


def test_saved_on_each_node(tmp_path, monkeypatch):
    """save_on_each_node: the first process of every machine writes, not only the first of all."""
    trainer = fresh(tmp_path, save_on_each_node=True)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_bucket_size_of_data_parallel_is_kept_over_the_boundary(tmp_path):
    from prunekern.training.data_parallel import lay_out_anew

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for given, want in ({}, None), ({"bucket_cap_mb": 7}, 7 * 2**20):
            old = torch.nn.parallel.DistributedDataParallel(attached(build()).model, **given)
            before, buckets = old.bucket_bytes_cap, old.reducer
            lay_out_anew(old.module)
            assert old.bucket_bytes_cap == before and old.reducer is not buckets
            assert want is None or old.bucket_bytes_cap == want
    finally:
        torch.distributed.destroy_process_group()
