"""The two stages of a run: the pruner's steps, final masks between the stages, and wherever a run ends before."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pruning.pruner import Pruner


class HasStages(Protocol):
    """What is asked of a `PruneTrainer`."""

    pruner: Pruner
    model: nn.Module
    accelerator: Any
    report: dict[str, Any] | None
    warm: float
    ramp: float

    def stage_one_steps(self, max_steps: int) -> int:
        """Of a run of so many steps."""

    def cross_boundary(self) -> None:
        """Final masks."""

    def refuse_unless_finite(self, what: str, value: float) -> None:
        """FloatingPointError for a loss or gradient norm that is not."""


class Stages(TrainerCallback):
    """Calls the pruner after every optimiser step, and finalises at the stage boundary."""

    def __init__(self, trainer: HasStages):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the lengths of the stages, by how long this run is."""
        boundary = self.trainer.stage_one_steps(state.max_steps)
        warm, ramp = (round(boundary * share) for share in (self.trainer.warm, self.trainer.ramp))
        pruner = self.trainer.pruner
        if not pruner.finalized and not state.global_step:
            pruner.steps = 0  # a run that was interrupted and starts anew is warm again
        elif not state.global_step and args.auto_find_batch_size and self.trainer.report is not None:
            raise RuntimeError(
                "auto_find_batch_size: memory ran out after the masks were final, and the run cannot start again from "
                "there; set per_device_train_batch_size"
            )
        pruner.schedule(warm, max(1, ramp))
        if pruner.finalized and pruner.masks:  # resumed in stage two
            self.trainer.report = pruner.report()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """FloatingPointError for gradients that are not finite."""
        if self.trainer.accelerator.scaler is None:  # a loss scaler meets such gradients, and skips the step, by itself
            grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            self.trainer.refuse_unless_finite("gradient norm", torch.nn.utils.get_total_norm(grads).item())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The pruner's step, and the boundary where it is reached."""
        pruner = self.trainer.pruner
        pruner.step()
        if state.global_step >= self.trainer.stage_one_steps(state.max_steps) and not pruner.finalized:
            self.trainer.cross_boundary()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that another callback ended in stage one: final masks, as the budget is what the run was for."""
        pruner = self.trainer.pruner
        if not pruner.masks or pruner.finalized:
            return
        boundary = self.trainer.stage_one_steps(state.max_steps)
        warnings.warn(
            f"PruneTrainer: training ended at step {state.global_step}, before stage one did (step {boundary} of "
            f"{state.max_steps}): the masks are made final now, by what they have learned, to remove "
            f"{pruner.config.sparsity:.4g} of the block {pruner.config.cost}; stage two did not take place",
            stacklevel=2,
        )
        self.trainer.cross_boundary()
