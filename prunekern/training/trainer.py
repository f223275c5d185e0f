"""transformers' Trainer with the two stages of pruning: masks and adapters learn; then the masks are final."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput

from ..pruning.adapter import load_adapter_state, save_adapter
from ..pruning.budget import Scores
from ..pruning.pruner import Pruner
from .arguments import check_arguments
from .callback import PruneCallback, around, refuse_unless_finite
from .checkpoints import finished_state, last_checkpoint, refuse_unfit, save_beside, weights_only
from .distillation import Distillation, On
from .optimizer import groups, holds_logits, made
from .sampler import ByEpoch
from .schedule import PAPER_SCHEDULE, SCHEDULE, adapter_rate, is_usual, mask_rate, refuse_schedule


class _Callback(PruneCallback):
    who = "PruneTrainer"


class PruneTrainer(Trainer):
    """`transformers.Trainer` with a `PruneCallback`, which says what the other arguments are, and its optimiser.

    pruner: what `attach` returned for `model`. The learning rate of adapters and head falls linearly from
    `args.learning_rate` to zero at the last step, or as another `args.lr_scheduler_type` says; with a
    `final_learning_rate` it is constant in each stage instead (5e-5 and 1e-5 in ASP-DAC 2025). `args.warmup_steps`
    counts in all. What of the arguments cannot be honoured is refused by name (`arguments` lists them all).

    objective: (model, inputs) -> loss, for a task that the model itself has no loss for (`tasks.ChoiceTask.objective`).

    Checkpoints hold the adapter, optimiser and trainer state, not the frozen weights. `train(resume_from_checkpoint=
    True)` takes the newest complete one and ends with the same masks and weights as a run that was never stopped.
    A loss or a gradient that is not finite raises FloatingPointError before the weights are touched; checkpoints stay.
    """

    # Of Trainer, which has no types.
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

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
        shrink: bool | None = None,
        rule: str = "learned",
        criterion: str | Scores = "magnitude",
        distil: On | Distillation | None = None,
        objective: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
        **kwargs: Any,
    ):
        model = pruner.model if model is None else model
        if model is not pruner.model:
            raise ValueError(f"PruneTrainer: model must be the one that pruner was attached to{around(model, pruner)}")
        if args is not None:
            check_arguments(args, final_learning_rate, objective)
        if final_learning_rate is None and (args is None or is_usual(args)):
            schedule = PAPER_SCHEDULE if pruner.config.preset == "paper" else SCHEDULE
            final_learning_rate = schedule["final_learning_rate"]
        if final_learning_rate is not None and args is not None:
            refuse_schedule(args, final_learning_rate)
        if objective is not None and kwargs.get("compute_loss_func") is not None:
            raise ValueError("PruneTrainer: compute_loss_func must be None with an objective: both compute the loss")
        if objective is not None and distil is not None:
            raise ValueError(
                "PruneTrainer: distil must be None with an objective, which takes the model's loss's place"
            )
        # It knows nothing of the rates of other parameters: they are this trainer's schedule.
        self.pruning = _Callback(
            pruner, stage_one=stage_one, warm=warm, ramp=ramp, mask_learning_rate=mask_learning_rate, shrink=shrink,
            rule=rule, criterion=criterion, distil=distil,
        )  # fmt: skip
        self.pruner, self.objective, self.final_learning_rate = pruner, objective, final_learning_rate
        self.stage_one, self.warm, self.ramp = self.pruning.stage_one, self.pruning.warm, self.pruning.ramp
        kwargs["callbacks"] = [self.pruning, *(kwargs.get("callbacks") or [])]
        super().__init__(model=model, args=args, **kwargs)
        handlers = self.callback_handler.callbacks  # first of all: the others log what it adds
        handlers.remove(self.pruning)
        handlers.insert(0, self.pruning)
        # Trainer takes any forward(**kwargs) for one that divides its loss by num_items_in_batch, and multiplies with
        # the number of processes to make up for it; of the heads we know only those of language models do.
        self.model_accepts_loss_kwargs &= type(model).__name__.endswith("ForCausalLM") and objective is None

    @property
    def report(self) -> dict[str, Any] | None:
        """What `pruner.finalize()` kept; None before."""
        return self.pruning.report

    def stage_one_steps(self, max_steps: int) -> int:
        """Of a run of so many steps."""
        return self.pruning.stage_one_steps(max_steps)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return ByEpoch(sampler, seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    # -- optimiser -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of `args`, with the mask logits in a group of their own."""
        if self.optimizer is None:
            cls, kwargs = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = made(cls, kwargs, groups(self.pruner, self.args, self.pruning.mask_learning_rate))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Rates by step: see the class."""
        if self.lr_scheduler is None:
            boundary = self.stage_one_steps(num_training_steps)
            adapters = adapter_rate(self.args, num_training_steps, boundary, self.final_learning_rate)
            masks = mask_rate(self.args, num_training_steps, boundary)
            optimizer = self.create_optimizer() if optimizer is None else optimizer
            by_group: list[Callable[[int], float]] = [
                masks if holds_logits(self.pruner, group) else adapters for group in optimizer.param_groups
            ]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, by_group)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # -- loss ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """As of Trainer. FloatingPointError for a loss that is not finite."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        refuse_unless_finite("loss", loss.item(), self.args, self.state)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:  # fmt: skip
        """That of `objective` where there is one."""
        if self.objective is None or return_outputs:  # outputs: evaluation by Trainer, which has its own loss
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        return self.objective(model, inputs)

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
        self.pruning.resumed = True

    def _load_best_model(self) -> None:
        load_adapter_state(self.pruner, str(self.state.best_model_checkpoint))

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
                self.state, self.pruning.report = state, self.pruner.report()
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)
