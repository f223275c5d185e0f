"""Whether a model fits its task: what would be an error in the middle of the work is said before it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..tasks import Task
from .options import console

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tasks import AnyTask

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # names of tables of positions


def check_length(model: nn.Module, name: object, max_length: int) -> None:
    """ValueError where texts may be longer than the model has positions."""
    most = positions(model)
    if most is not None and max_length > most:
        raise ValueError(f"{name}: --max-length must be at most {most}, its positions (got {max_length})")


def positions(model: nn.Module) -> int | None:
    """Tokens that a model with a table of positions takes; None where positions are computed."""
    from torch import nn

    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _POSITIONS:
            # RoBERTa counts from the place after its padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def check_head(auto_class: Any, model: str, purpose: str, **options: Any) -> None:
    """ValueError where tensors of the folder have other shapes than its config, or the task, asks for."""
    from ..training.recipe import with_head

    _, found = with_head(auto_class, model, purpose, **options, ignore_mismatched_sizes=True, output_loading_info=True)
    for name, got, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"{model}: tensor {name!r} has shape {list(got)}, where its config and {purpose} ask for {list(wanted)}"
        )


def check_kind(model: PreTrainedModel, name: object, task: Task) -> None:
    """ValueError where a model was trained for labels of another kind: its scores would be nonsense, and no error."""
    known = getattr(model.config, "problem_type", None)
    if None not in (known, task.problem_type) and known != task.problem_type:
        raise ValueError(f"{name}: was trained for {known}, {task.name} is {task.problem_type}")
    wanted = type(model).__name__
    for trained in getattr(model.config, "architectures", None) or []:
        if "ForTokenClassification" in wanted + trained and trained != wanted:
            raise ValueError(f"{name}: was trained as {trained}, {task.name} asks for {wanted}")


def say_cut(task: AnyTask, tokenizer: PreTrainedTokenizerBase, max_length: int, splits: Iterable[str]) -> None:
    """A warning for each split with texts longer than max_length tokens."""
    if not isinstance(task, Task):
        return
    for split in splits:
        cut = task.count_cut(tokenizer, max_length, split)
        if cut:
            rows = f"{cut:,} of {len(task.splits[split]):,} rows of {split}"
            console.print(f"[yellow]warning:[/] {rows} are longer than --max-length {max_length} and are cut to it")


def check_positive(**options: float | None) -> None:
    """ValueError for an option that is no positive, finite number; None counts as not given."""
    for name, value in options.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be positive (got {value})")


def check_bf16() -> None:
    """ValueError where training runs on a CPU whose bf16 products kill the process."""
    import torch

    from ..machine.bf16_trap import BF16_REASON, bf16_matmul_crashes

    if not torch.accelerator.is_available() and bf16_matmul_crashes():
        raise ValueError(f"--bf16: {BF16_REASON}")
