"""transformers' Trainer with the two stages of pruning: masks and adapters learn; then the masks are final."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from ..pruning.adapter import load_adapter_state, save_adapter
from ..pruning.budget import Scores
from ..pruning.pruner import Pruner
from .arguments import check_arguments
from .checkpoints import finished_state, last_checkpoint, refuse_unfit, save_beside, weights_only
from .data_parallel import wrapped_anew
from .sampler import ByEpoch
from .schedule import PAPER_SCHEDULE, SCHEDULE, adapter_rate, is_usual, mask_rate, refuse_schedule
from .stages import Stages


class PruneTrainer(Trainer):
    """`transformers.Trainer` for an attached model. What is None is as in SCHEDULE, in PAPER_SCHEDULE for that preset.

    pruner: what `attach` returned for `model`. stage_one: share of the optimiser steps in which masks learn; then
    `pruner.finalize()` and stage two, adapters only. warm: share of stage one in which all masks are on and saliency
    is gathered, for the logits to start from; 0: they start flat. ramp: share of stage one, after that, over which the
    removed share rises to the target. rule, criterion: of `pruner.finalize`.

    The learning rate of adapters and head falls linearly from `args.learning_rate` to zero at the last step, or as
    another `args.lr_scheduler_type` says; with a `final_learning_rate` it is constant in each stage instead (5e-5 and
    1e-5 in ASP-DAC 2025). `args.warmup_steps` counts in all. Mask logits have `mask_learning_rate` until they are
    final. What of the arguments cannot be honoured is refused by name (`arguments` lists them all).

    Where a callback ends the run in stage one (early stopping), the masks are made final all the same, with a warning.

    objective: (model, inputs) -> loss, for a task that the model itself has no loss for (`tasks.ChoiceTask.objective`).

    shrink: drop pruned channels at the boundary (`Pruner.shrink`), so that a step of stage two costs what is left.

    Under `torchrun` or accelerate (DistributedDataParallel) all ranks see the same masks, and end with the same plan.

    Checkpoints hold the adapter, optimiser and trainer state, not the frozen weights. `train(resume_from_checkpoint=
    True)` takes the newest complete one and ends with the same masks and weights as a run that was never stopped.
    A loss or a gradient that is not finite raises FloatingPointError before the weights are touched; checkpoints stay.
    """

    # Of Trainer, which has no types.
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    model_wrapped: nn.Module

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        pruner: Pruner,
        stage_one: float | None = None,
        warm: float | None = None,
        ramp: float | None = None,
        final_learning_rate: float | None = None,
        mask_learning_rate: float | None = None,
        shrink: bool = True,
        rule: str = "learned",
        criterion: str | Scores = "magnitude",
        objective: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
        **kwargs: Any,
    ):
        model = pruner.model if model is None else model
        if model is not pruner.model:
            raise ValueError(f"PruneTrainer: model must be the one that pruner was attached to{_around(model, pruner)}")
        schedule = PAPER_SCHEDULE if pruner.config.preset == "paper" else SCHEDULE

        def or_usual(name: str, value: float | None) -> float:
            usual = schedule[name] if value is None else value
            assert usual is not None, name
            return usual

        stage_one, warm, ramp = or_usual("stage_one", stage_one), or_usual("warm", warm), or_usual("ramp", ramp)
        mask_learning_rate = or_usual("mask_learning_rate", mask_learning_rate)
        if args is not None:
            check_arguments(args, final_learning_rate, objective)
        if final_learning_rate is None and (args is None or is_usual(args)):
            final_learning_rate = schedule["final_learning_rate"]
        if final_learning_rate is not None and args is not None:
            refuse_schedule(args, final_learning_rate)
        if objective is not None and kwargs.get("compute_loss_func") is not None:
            raise ValueError("PruneTrainer: compute_loss_func must be None with an objective: both compute the loss")
        for name, value in (("stage_one", stage_one), ("ramp", ramp)):
            if not 0 < value <= 1:
                raise ValueError(f"PruneTrainer: {name} must be in (0, 1] (got {value})")
        if not 0 <= warm < 1:
            raise ValueError(f"PruneTrainer: warm must be in [0, 1) (got {warm})")
        if not pruner.shrunk:
            pruner.check_rule(rule, criterion)
        super().__init__(model=model, args=args, **kwargs)
        # Trainer takes any forward(**kwargs) for one that divides its loss by num_items_in_batch, and multiplies with
        # the number of processes to make up for it; of the heads we know only those of language models do.
        self.model_accepts_loss_kwargs &= type(model).__name__.endswith("ForCausalLM") and objective is None
        self.pruner, self.stage_one, self.warm, self.ramp = pruner, stage_one, warm, ramp
        self.final_learning_rate, self.mask_learning_rate = final_learning_rate, mask_learning_rate
        self.shrink, self.rule, self.criterion, self.objective = shrink, rule, criterion, objective
        self.report: dict[str, Any] | None = None  # what finalize() kept
        self._rewrapped: DistributedDataParallel | None = None
        self.add_callback(Stages(self))

    def stage_one_steps(self, max_steps: int) -> int:
        """Of a run of so many steps."""
        return max(1, round(max_steps * self.stage_one))

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByEpoch(sampler, seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    # -- optimiser -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of `args`, with the mask logits in a group of their own."""
        if self.optimizer is None:
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if is_optimizer_factory(cls) or {"params", "model", "optimizer_dict"} & set(kwargs):
                raise ValueError(
                    f"PruneTrainer: optimizer_cls_and_kwargs must be a class that takes parameter groups (got {cls})"
                )
            self.optimizer = cls(self._groups(), **kwargs)
        return self.optimizer

    def _groups(self) -> list[dict[str, Any]]:
        """Those of the pruner; biases and norms, which Trainer never decays, in one more where there is decay."""
        decay = self.args.weight_decay
        groups = self.pruner.param_groups(self.args.learning_rate, self.mask_learning_rate, decay)
        if decay:
            names = set(self.get_decay_parameter_names(self.model))
            kept = {id(p) for name, p in self.model.named_parameters() if name not in names}
            for group in [group for group in groups if group["name"] == "adapters"]:
                spared = [p for p in group["params"] if id(p) in kept]
                group["params"] = [p for p in group["params"] if id(p) not in kept]
                if spared:
                    groups.append({**group, "params": spared, "weight_decay": 0.0, "name": "not decayed"})
        return groups

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Rates by step: see the class."""
        if self.lr_scheduler is None:
            boundary = self.stage_one_steps(num_training_steps)
            adapters = adapter_rate(self.args, num_training_steps, boundary, self.final_learning_rate)
            masks = mask_rate(self.args, num_training_steps, boundary)
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            groups = optimizer.param_groups
            by_group: list[Callable[[int], float]] = [masks if self.holds_logits(g) else adapters for g in groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, by_group)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def holds_logits(self, group: dict[str, Any]) -> bool:
        """Whether a group of the optimiser is the mask logits'. ValueError where it holds other parameters too."""
        logits = {id(mask.logits) for mask in self.pruner.masks.values()}
        count = sum(id(p) in logits for p in group["params"])
        if 0 < count < len(group["params"]):
            raise ValueError(
                "PruneTrainer: optimizers: mask logits must have a group of their own; build the optimizer from "
                "pruner.param_groups()"
            )
        return count > 0

    def cross_boundary(self) -> None:
        """Between the stages: final masks, and the pruned channels gone where `shrink` says so."""
        self.report = self.pruner.finalize(self.rule, self.criterion)
        if self.shrink:
            self.pruner.shrink(self.optimizer)
        old = self.model_wrapped
        if isinstance(old, DistributedDataParallel):
            # Its buckets were laid out for the parameters of stage one, logits among them.
            new = wrapped_anew(old)
            self._rewrapped = self.model_wrapped = new
            self.accelerator._models = [new if m is old else m for m in self.accelerator._models]

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As of Trainer. FloatingPointError for a loss that is not finite."""
        # The training loop holds on to the wrapper it began with.
        loss: Tensor = super().training_step(model if self._rewrapped is None else self._rewrapped, *args, **kwargs)
        self.refuse_unless_finite("loss", loss.item())
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:  # fmt: skip
        """That of `objective` where there is one."""
        if self.objective is None or return_outputs:  # outputs: evaluation by Trainer, which has its own loss
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return self.objective(model, inputs)

    def refuse_unless_finite(self, what: str, value: float) -> None:
        """FloatingPointError for a loss or gradient norm that is not, before the weights are touched."""
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{what} is {value} at step {self.state.global_step + 1}; training stops, weights are those of "
                f"step {self.state.global_step} and checkpoints in {self.args.output_dir} are untouched"
            )

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """With the share removed, flips and what each kind of channel group keeps."""
        if "loss" in logs or any(k.endswith("_loss") for k in logs):
            logs = {**logs, "sparsity": round(self.pruner.expected_sparsity(), 6), **self._mask_logs()}
        super().log(logs, *args, **kwargs)

    def _mask_logs(self) -> dict[str, float]:
        """Flips at the last step, and the kept share by kind and by carrier, while masks move."""
        if self.pruner.finalized or not self.pruner.masks:
            return {}
        kept = {f"kept/{name}": round(share, 4) for name, share in self.pruner.kept_shares().items()}
        return {"flips": self.pruner.flips, **kept}

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter: what training changed; with the tokenizer and the arguments, as Trainer does."""
        if self.args.should_save:
            super().save_model(output_dir, _internal_call)
        if _internal_call:  # a checkpoint: the other ranks add their files once the folder has its name
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir
        save_adapter(self.pruner, folder)
        save_beside(folder, self.processing_class or getattr(self.data_collator, "tokenizer", None), self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter_state(self.pruner, resume_from_checkpoint)

    # Trainer reads all of these with weights_only=True; what it says of one that holds more names no file.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with weights_only(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with weights_only(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with weights_only(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As of Trainer; True goes on from the newest complete checkpoint (FileNotFoundError where there is none)."""
        if resume_from_checkpoint is True:
            newest = last_checkpoint(self.args.output_dir)
            if newest is None:
                raise FileNotFoundError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            refuse_unfit(resume_from_checkpoint)
            state = finished_state(resume_from_checkpoint, self.args)
            if state is not None:
                load_adapter_state(self.pruner, resume_from_checkpoint)
                self.state, self.report = state, self.pruner.report()
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _around(model: nn.Module, pruner: Pruner) -> str:
    """What else to say of a wrapper that holds the pruner's model."""
    if not any(part is pruner.model for part in model.modules()):
        return ""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return f" (got a {kind} around it): leave model out; to compile it, set torch_compile in its TrainingArguments"
