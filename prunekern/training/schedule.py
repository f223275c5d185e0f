"""The usual schedule, and learning rates by step: of adapters and head as `lr_scheduler_type` says, of mask logits
while they learn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import TrainingArguments, get_scheduler

from ..pruning.pruner import Pruner

Rate = Callable[[int], float]  # step from 0 -> factor of the group's learning rate

# docs/learning-to-prune.md tells what set these.
SCHEDULE: dict[str, float | None] = {
    "stage_one": 0.65,
    "warm": 0.6,
    "ramp": 0.2,
    "final_learning_rate": None,
    "mask_learning_rate": 5e-2,
}
# Ali et al., ASP-DAC 2025: two constant rates; of masks the paper says only that they are learned.
PAPER_SCHEDULE: dict[str, float | None] = {
    "stage_one": 0.6,
    "warm": 0.0,
    "ramp": 0.5,
    "final_learning_rate": 1e-5,
    "mask_learning_rate": 2e-2,
}


def usual(pruner: Pruner, name: str, value: float | None) -> float:
    """`value`, or what is usual for the pruner's preset where it is None."""
    found = (PAPER_SCHEDULE if pruner.config.preset == "paper" else SCHEDULE)[name] if value is None else value
    assert found is not None, name
    return found


BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def is_usual(args: TrainingArguments) -> bool:
    """Whether no other schedule than TrainingArguments' own default is asked for."""
    return _type(args) == "linear" and not args.lr_scheduler_kwargs


def refuse_schedule(args: TrainingArguments, final_learning_rate: float | None, who: str = "PruneTrainer") -> None:
    """ValueError for a schedule that depends on metrics, or does not go with a `final_learning_rate`."""
    name = _type(args)
    if name in BY_METRIC:
        raise ValueError(
            f"{who}: lr_scheduler_type must not be one of {BY_METRIC} (got {name!r}): they follow a metric, "
            "which jumps where channels go"
        )
    if final_learning_rate is not None:
        if not args.learning_rate > 0:
            raise ValueError(
                f"{who}: learning_rate must be positive with a final_learning_rate (got {args.learning_rate})"
            )
        if not is_usual(args):
            raise ValueError(
                f"{who}: lr_scheduler_type must be 'linear', without lr_scheduler_kwargs, with a "
                f"final_learning_rate, which says what the rates are (got {name!r}, {args.lr_scheduler_kwargs})"
            )
    try:
        theirs(args, 10)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: lr_scheduler_kwargs must fit lr_scheduler_type {name!r} (got {args.lr_scheduler_kwargs}): {error}"
        ) from None


def theirs(args: TrainingArguments, steps: int) -> Rate:
    """transformers' schedule of that type over so many steps, warm-up included."""
    optimizer = torch.optim.SGD(
        [torch.zeros(1, dtype=torch.float32, requires_grad=True, device="cpu")], lr=args.learning_rate
    )
    scheduler = get_scheduler(
        _type(args),
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
    )
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(f"{type(scheduler).__name__} is no function of the step")
    rate: Rate = scheduler.lr_lambdas[0]
    return lambda step: rate(step)  # a plain function, which a scheduler's state leaves out


def adapter_rate(args: TrainingArguments, steps: int, boundary: int, final_learning_rate: float | None) -> Rate:
    """Of adapters and head. Linear: to zero at the last step; with a `final_learning_rate` constant in each stage."""
    if final_learning_rate is None and not is_usual(args):
        return theirs(args, steps)
    warm_up = _warm_up(args, steps)

    def linear(step: int) -> float:
        return warm_up(step) * max(0.0, 1 - step / max(1, steps))

    def staged(step: int) -> float:
        assert final_learning_rate is not None
        return warm_up(step) * (1.0 if step < boundary else final_learning_rate / args.learning_rate)

    return linear if final_learning_rate is None else staged


def mask_rate(args: TrainingArguments, steps: int, boundary: int) -> Rate:
    """Of mask logits: constant after the warm-up, until they are final."""
    warm_up = _warm_up(args, steps)
    return lambda step: warm_up(step) if step < boundary else 0.0


def _warm_up(args: TrainingArguments, steps: int) -> Rate:
    warmup: int = args.get_warmup_steps(steps)
    return lambda step: min(1.0, (step + 1) / (warmup + 1))


def _type(args: TrainingArguments) -> str:
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
