"""What the tasks of causal language models have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .task import take_rows

if TYPE_CHECKING:
    from datasets import DatasetDict
    from typing_extensions import Self


class CausalTask:
    """To be inherited by frozen dataclasses with `splits`: how a model is loaded, and a smaller task of the same."""

    splits: DatasetDict

    def model_class(self) -> Any:
        """What loads a model for this task."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def model_kwargs(self) -> dict[str, Any]:
        """For `model_class().from_pretrained`: a language model's head is not new."""
        return {}

    def take(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> Self:
        """The same task with at most that many rows a split, drawn without replacement; None keeps it whole."""
        smaller: Any = self  # a dataclass, as all that inherit this are
        taken: Self = replace(smaller, splits=take_rows(self.splits, (train, validation, test), seed))
        return taken
