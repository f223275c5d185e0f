"""Short runs of transformers' own Trainer with a `PruneCallback`, for tests."""

from transformers import Trainer

import prunekern as pk
from tests.helpers.tiny_models import attached, build
from tests.helpers.trainer_runs import Rows, arguments

STAGES = {"mask_learning_rate": 0.1, "final_learning_rate": 1e-3, "stage_one": 0.6, "warm": 0.2, "ramp": 0.4}


class Unlabelled(Rows):
    def __getitem__(self, i):
        return {k: v for k, v in super().__getitem__(i).items() if k != "labels"}


def fresh(
    folder, stages=None, rows=None, model_options=None, trainer=Trainer, trainer_options=None, config=None, **options
):
    """As `trainer_runs.fresh`, which it equals to the bit. Returns the trainer, with its callback in `pruning`."""
    model = build(**{"dropout": 0.1, "attention_dropout": 0.1, "seq_classif_dropout": 0.1} | (model_options or {}))
    pruner = attached(model, **{"sparsity": 0.4, "dropout": 0.1} | (config or {}))
    callback = pk.PruneCallback(pruner, **STAGES | (stages or {}))
    args = arguments(folder, **options)
    made = trainer(
        model,
        args,
        train_dataset=rows or Rows(),
        callbacks=[callback],
        optimizers=(pk.optimizer(pruner, args, STAGES["mask_learning_rate"]), None),
        **trainer_options or {},
    )
    made.pruning, made.pruner = callback, pruner
    return made
