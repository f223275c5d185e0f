"""The two stages of pruning in any subclass of transformers' Trainer: masks and adapters learn; then masks stay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pruning.budget import Scores
from ..pruning.masked_hf import Fits, say_masked
from ..pruning.pruner import Pruner
from ..storage.json_files import read_json
from .arguments import check_arguments
from .data_parallel import lay_out_anew
from .distillation import Distillation, On, SelfTaught
from .embeddings import DistilLoss
from .optimizer import holds_logits, refuse_incomplete
from .schedule import adapter_rate, mask_rate, usual


class PruneCallback(TrainerCallback):
    """All of `PruneTrainer` for a Trainer of any kind (of sentence-transformers, TRL, your own), which is not changed:

        pruner = prunekern.attach(model, config)
        trainer = AnyTrainer(model, args, ..., callbacks=[prunekern.PruneCallback(pruner)],
                             optimizers=(prunekern.optimizer(pruner, args), None))

    pruner: what `attach` returned for the Trainer's model, or for one inside it. stage_one: share of the optimiser
    steps in which masks learn; then `pruner.finalize()` and stage two, adapters only. warm: share of stage one in which
    all masks are on and saliency is gathered, for the logits to start from; 0: they start flat. ramp: share of stage
    one, after that, over which the removed share rises to the target. rule, criterion: of `pruner.finalize`. What is
    None is as in `schedule.SCHEDULE`, in PAPER_SCHEDULE for that preset.

    Rates: mask logits have `mask_learning_rate` until they are final, whatever the Trainer's schedule; the other
    parameters follow that schedule, or with a `final_learning_rate` are constant in each stage.

    shrink: drop pruned channels at the boundary (`Pruner.shrink`), so that a step of stage two costs what is left.
    None: yes, unless there is `distil`, for which the original weights must stay.

    distil: "logits" or "hidden", or a `Distillation`: the model as it was when the run began teaches the pruned one,
    beside the task's loss or, without labels, alone. Of sentence-transformers: the `DistilLoss` that the Trainer has.

    Where training ends in stage one (early stopping), the masks are made final all the same, with a warning.
    `load_best_model_at_end` chooses among the checkpoints of stage two: those before do not meet the budget. A run
    resumes from any checkpoint that Trainer wrote. Under DistributedDataParallel all ranks see the same masks. What
    of the arguments cannot be honoured is refused by name. FloatingPointError for a gradient that is not finite.

    Attribute `report`: what `finalize` returned, None before.
    """

    who = "PruneCallback"  # for messages

    def __init__(
        self,
        pruner: Pruner,
        *,
        stage_one: float | None = None,
        warm: float | None = None,
        ramp: float | None = None,
        final_learning_rate: float | None = None,
        mask_learning_rate: float | None = None,
        shrink: bool | None = None,
        rule: str = "learned",
        criterion: str | Scores = "magnitude",
        distil: On | Distillation | DistilLoss | None = None,
    ):
        if not isinstance(pruner, Pruner):
            raise TypeError(f"{self.who}: pruner must be what prunekern.attach returned (got {type(pruner).__name__})")
        self.pruner = pruner
        self.stage_one, self.warm, self.ramp = (
            usual(pruner, name, value) for name, value in (("stage_one", stage_one), ("warm", warm), ("ramp", ramp))
        )
        self.mask_learning_rate = usual(pruner, "mask_learning_rate", mask_learning_rate)
        self.final_learning_rate = final_learning_rate
        for name, value in (("stage_one", self.stage_one), ("ramp", self.ramp)):
            if not 0 < value <= 1:
                raise ValueError(f"{self.who}: {name} must be in (0, 1] (got {value})")
        if not 0 <= self.warm < 1:
            raise ValueError(f"{self.who}: warm must be in [0, 1) (got {self.warm})")
        if not pruner.shrunk:
            pruner.check_rule(rule, criterion)
        self.rule, self.criterion = rule, criterion
        how = Distillation(distil) if isinstance(distil, str) else distil
        if not isinstance(how, (Distillation, DistilLoss, type(None))):
            raise TypeError(
                f"{self.who}: distil must be 'logits', 'hidden', a Distillation or a DistilLoss (got "
                f"{type(how).__name__})"
            )
        self.distil: SelfTaught | DistilLoss | None = None if how is None else how.of(pruner)
        if self.distil is not None and shrink:
            raise ValueError(f"{self.who}: shrink must be False with distil (got True): the original weights must stay")
        self.shrink = self.distil is None if shrink is None else shrink
        self.report: dict[str, Any] | None = None
        self._adapters: Callable[[int], float] | None = None
        self._masks: Callable[[int], float] | None = None
        say_masked(pruner)
        self._fits = Fits(pruner)
        self.resumed = False  # by someone who has restored the pruner's own state, too

    def stage_one_steps(self, max_steps: int) -> int:
        """Of a run of so many steps."""
        return max(1, round(max_steps * self.stage_one))

    # -- the run begins ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """ValueError for arguments, or a model, that pruning does not go with."""
        check_arguments(args, self.final_learning_rate, who=self.who)
        self._refuse_other(kwargs.get("model"))

    def _refuse_other(self, model: Any) -> None:
        if model is not None and not any(module is self.pruner.model for module in model.modules()):
            raise ValueError(
                f"{self.who}: model must be the one that pruner was attached to, or hold it (got a "
                f"{type(model).__name__} without it)"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the lengths of the stages, by how long this run is."""
        pruner, model = self.pruner, kwargs.get("model")
        check_arguments(args, self.final_learning_rate, who=self.who)
        self._refuse_other(model)
        if kwargs.get("optimizer") is not None:
            refuse_incomplete(pruner, kwargs["optimizer"], pruner.model if model is None else model)
        boundary = self.stage_one_steps(state.max_steps)
        warm, ramp = (round(boundary * share) for share in (self.warm, self.ramp))
        if state.global_step and not (self._fits.loaded or self.resumed):
            raise RuntimeError(
                f"{self.who}: the run goes on from step {state.global_step}, but its checkpoint was not loaded into "
                "the pruner's model"
            )
        if state.global_step and not self.resumed:
            self._refuse_other_config(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "config.json")
            pruner.resume_at(state.global_step, warm, max(1, ramp))
        elif not pruner.finalized and not state.global_step:
            pruner.steps = 0  # a run that was interrupted and starts anew is warm again
        elif not state.global_step and args.auto_find_batch_size and self.report is not None:
            raise RuntimeError(
                "auto_find_batch_size: memory ran out after the masks were final, and the run cannot start again from "
                "there; set per_device_train_batch_size"
            )
        self._fits.loaded = self.resumed = False
        pruner.schedule(warm, max(1, ramp))
        if pruner.finalized and pruner.masks:  # resumed in stage two
            self.report = pruner.report()
        self._masks = mask_rate(args, state.max_steps, boundary)
        if self.final_learning_rate is not None:
            self._adapters = adapter_rate(args, state.max_steps, boundary, self.final_learning_rate)
        if self.distil is not None:
            self.distil.begin(args)

    def _refuse_other_config(self, file: Path) -> None:
        """Where the checkpoint that the run goes on from is in its usual place, the config it was written with."""
        said = read_json(file).get("quantization_config") if file.is_file() else None
        theirs = said.get("prune_config") if isinstance(said, dict) else None
        for name, ours in self.pruner.config.to_dict().items():
            if isinstance(theirs, dict) and theirs.get(name, ours) != ours:
                raise ValueError(
                    f"{self.who}: {file} was trained with {name}={theirs[name]!r}, this run has {name}={ours!r}; "
                    "resume with the config it was trained with, or train into another folder"
                )

    # -- steps ---------------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rates of this step. FloatingPointError for gradients that are not finite."""
        model, optimizer = kwargs.get("model", self.pruner.model), kwargs.get("optimizer")
        if not args.fp16:  # a loss scaler meets such gradients, and skips the step, by itself
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            refuse_unless_finite("gradient norm", torch.nn.utils.get_total_norm(grads).item(), args, state)
        if optimizer is not None:
            self._set_rates(optimizer, args, state.global_step)
        if self.distil is not None:
            self.distil.check_step()

    def _set_rates(self, optimizer: torch.optim.Optimizer, args: TrainingArguments, step: int) -> None:
        assert self._masks is not None, "on_train_begin was not called"
        # Of the pupil alone there is nothing to learn yet: it is its own teacher as long as all masks are on.
        rests = self.distil is not None and self.distil.rests
        for group in optimizer.param_groups:
            if holds_logits(self.pruner, group):
                group["lr"] = self.mask_learning_rate * self._masks(step)
            elif self._adapters is not None:
                group["lr"] = args.learning_rate * self._adapters(step)
            if rests:
                group["lr"] = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The pruner's step, and the boundary where it is reached."""
        self.pruner.step()
        if state.global_step >= self.stage_one_steps(state.max_steps) and not self.pruner.finalized:
            self._cross_boundary(kwargs.get("optimizer"), state)

    def _cross_boundary(self, optimizer: Any, state: TrainerState) -> None:
        """Between the stages: final masks, and the pruned channels gone where `shrink` says so."""
        self.report = self.pruner.finalize(self.rule, self.criterion)
        if self.shrink:
            self.pruner.shrink(getattr(optimizer, "optimizer", optimizer))
        lay_out_anew(self.pruner.model)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None  # they did not meet the budget

    # -- the run ends --------------------------------------------------------------------------------------------

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that another callback ended in stage one: final masks, as the budget is what the run was for."""
        if self.distil is not None:
            self.distil.end()
        pruner = self.pruner
        if not pruner.masks or pruner.finalized:
            return
        boundary = self.stage_one_steps(state.max_steps)
        warnings.warn(
            f"{self.who}: training ended at step {state.global_step}, before stage one did (step {boundary} of "
            f"{state.max_steps}): the masks are made final now, by what they have learned, to remove "
            f"{pruner.config.sparsity:.4g} of the block {pruner.config.cost}; stage two did not take place",
            stacklevel=2,
        )
        self._cross_boundary(kwargs.get("optimizer"), state)

    # -- what is seen --------------------------------------------------------------------------------------------

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the share removed, flips and what each kind of channel group keeps, for the log history and for
        callbacks that come after this one.
        """
        if not logs or not any(name == "loss" or name.endswith("_loss") for name in logs):
            return
        more = {"sparsity": round(self.pruner.expected_sparsity(), 6), **self._mask_logs()}
        if self.distil is not None:
            more |= self.distil.logs()
        if self._adapters is not None and "learning_rate" in logs:
            more["learning_rate"] = args.learning_rate * self._adapters(max(0, state.global_step - 1))
        logs.update(more)
        if state.log_history:
            state.log_history[-1].update(more)

    def _mask_logs(self) -> dict[str, float]:
        """Flips at the last step, and the kept share by kind and by carrier, while masks move."""
        if self.pruner.finalized or not self.pruner.masks:
            return {}
        kept = {f"kept/{name}": round(share, 4) for name, share in self.pruner.kept_shares().items()}
        return {"flips": self.pruner.flips, **kept}


def refuse_unless_finite(what: str, value: float, args: TrainingArguments, state: TrainerState) -> None:
    """FloatingPointError for a loss or gradient norm that is not, before the weights are touched."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{what} is {value} at step {state.global_step + 1}; training stops, weights are those of "
            f"step {state.global_step} and checkpoints in {args.output_dir} are untouched"
        )


def around(model: nn.Module, pruner: Pruner) -> str:
    """What else to say of a wrapper that holds the pruner's model."""
    if not any(part is pruner.model for part in model.modules()):
        return ""
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return f" (got a {kind} around it): leave model out; to compile it, set torch_compile in its TrainingArguments"
