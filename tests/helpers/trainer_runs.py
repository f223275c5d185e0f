"""Short runs of PruneTrainer on a tiny model, for tests."""

import torch
from transformers import TrainerCallback, TrainingArguments

import prunekern as pk
from tests.helpers.tiny_models import attached, build

STEPS, BOUNDARY = 10, 6  # of a run: stage_one 0.6


class Rows(torch.utils.data.Dataset):
    """24 sentences of 8 tokens; `poison`: the label of this row makes the loss NaN through the model's own input."""

    def __init__(self, size=24):
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 50, (size, 8), generator=g)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(8, dtype=torch.int64), "labels": int(i) % 3}


def arguments(folder, **options):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 7}
    defaults |= {"dataloader_pin_memory": False, "save_total_limit": None}
    return TrainingArguments(output_dir=str(folder), **defaults | options)


def fresh(folder, callbacks=(), trainer_options=None, model_options=None, **options):
    """A trainer on a model with dropout everywhere it can be."""
    model = build(**{"dropout": 0.1, "attention_dropout": 0.1, "seq_classif_dropout": 0.1} | (model_options or {}))
    pruner = attached(model, sparsity=0.4, dropout=0.1)
    defaults = {"mask_learning_rate": 0.1, "final_learning_rate": 1e-3, "stage_one": 0.6, "warm": 0.2, "ramp": 0.4}
    trainer_options = defaults | (trainer_options or {})
    return pk.PruneTrainer(
        args=arguments(folder, **options),
        pruner=pruner,
        train_dataset=Rows(),
        callbacks=list(callbacks),
        **trainer_options,
    )


def result(trainer):
    return {n: t.clone() for n, t in trainer.model.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Each(TrainerCallback):
    """Call `f(step)` after each optimiser step's bookkeeping."""

    def __init__(self, f):
        self.f = f

    def on_step_end(self, args, state, control, **kwargs):
        self.f(state.global_step)


class Stop(Exception):
    pass


def stop_at(wanted):
    def f(step):
        if step == wanted:
            raise Stop

    return Each(f)
