"""The optimiser of a run: that of the arguments, with mask logits in a group of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from ..pruning.pruner import Pruner
from .schedule import usual


def optimizer(
    pruner: Pruner, args: TrainingArguments, mask_learning_rate: float | None = None, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """What any `transformers.Trainer` is to be given beside a `PruneCallback`:
    `Trainer(..., optimizers=(prunekern.optimizer(pruner, args), None))`. Its schedule stays the Trainer's.

    Class, learning rate and weight decay are those of `args`; biases and norms are not decayed, as in Trainer. Mask
    logits are in a group of their own, with `mask_learning_rate` (None: as in `PruneCallback`), never decayed.
    model: what is trained, where that is more than the pruner's model (modules of a SentenceTransformer, a loss with
    weights): its other trainable parameters come in, too. ValueError for an optimiser that chooses parameters itself.
    """
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, pruner.model)
    rate = usual(pruner, "mask_learning_rate", mask_learning_rate)
    return made(cls, kwargs, groups(pruner, args, rate, () if model is None else (model,)))


def made(cls: Any, kwargs: dict[str, Any], parameter_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`cls(groups)`. ValueError where the class takes a model, or its arguments choose parameters."""
    if is_optimizer_factory(cls) or {"params", "model", "optimizer_dict"} & set(kwargs):
        raise ValueError(
            f"optimizer: optim or optimizer_cls_and_kwargs must be a class that takes parameter groups (got {cls})"
        )
    built: torch.optim.Optimizer = cls(parameter_groups, **kwargs)
    return built


def groups(
    pruner: Pruner, args: TrainingArguments, mask_learning_rate: float, also: Iterable[nn.Module] = ()
) -> list[dict[str, Any]]:
    """Those of the pruner; biases and norms, which Trainer never decays, in one more where there is decay."""
    decay = args.weight_decay
    found = pruner.param_groups(args.learning_rate, mask_learning_rate, decay)
    have = {id(p) for group in found for p in group["params"]}
    models = [pruner.model, *also]
    for model in models[1:]:
        more = [p for p in model.parameters() if p.requires_grad and id(p) not in have]
        found[0]["params"] = [*found[0]["params"], *more]
        have |= {id(p) for p in more}
    if decay:
        spared_ids: set[int] = set()
        for model in models:
            names = set(Trainer.get_decay_parameter_names(None, model))
            spared_ids |= {id(p) for name, p in model.named_parameters() if name not in names}
        for group in [group for group in found if group["name"] == "adapters"]:
            spared = [p for p in group["params"] if id(p) in spared_ids]
            group["params"] = [p for p in group["params"] if id(p) not in spared_ids]
            if spared:
                found.append({**group, "params": spared, "weight_decay": 0.0, "name": "not decayed"})
    return found


def holds_logits(pruner: Pruner, group: dict[str, Any]) -> bool:
    """Whether a group of an optimiser is the mask logits'. ValueError where it holds other parameters too."""
    logits = {id(mask.logits) for mask in pruner.masks.values()}
    count = sum(id(p) in logits for p in group["params"])
    if 0 < count < len(group["params"]):
        raise ValueError(
            "optimizers: mask logits must have a group of their own; build the optimizer by "
            "prunekern.optimizer(pruner, args), or from pruner.param_groups()"
        )
    return count > 0


def refuse_incomplete(pruner: Pruner, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """ValueError for an optimiser that would leave something untrained, without a word: it was built before `attach`,
    or of a part of the model only.
    """
    have = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, mask in pruner.masks.items():
        if mask.logits.requires_grad and id(mask.logits) not in have:
            raise ValueError(
                f"optimizers: must hold the mask logits (those of {name!r} are missing): it was built before "
                "prunekern.attach; pass optimizers=(prunekern.optimizer(pruner, args), None), built after it"
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in have:
            raise ValueError(
                f"optimizers: must hold every trainable parameter ({name!r} is missing); build it by "
                "prunekern.optimizer(pruner, args, model=model), or freeze what is not to be trained"
            )
    for group in optimizer.param_groups:
        holds_logits(pruner, group)
