"""What prunekern knows of architectures, one file each. `of(model)` finds the family of a model.

`family.Family` says what a family is; `table` has what its channel groups are made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .family import Family, StockConfig
from .table import COSTS, Group, Layer, Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _families() -> tuple[Family, ...]:
    from .decoders import llama
    from .encoders import bert, distilbert

    return distilbert, bert, llama


def of(model: nn.Module) -> Family:
    """The family of a transformers model. ValueError for an architecture without one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = of_type(model_type)
    if family is None:
        known = {t for family in _families() for t in family.MODEL_TYPES}
        what = f"model type {model_type!r}" if model_type else "it is no transformers model"
        raise ValueError(f"model: {type(model).__name__} has no family ({what}); accepted: {', '.join(sorted(known))}")
    return family


def of_type(model_type: str | None) -> Family | None:
    """The family of transformers' `model_type`; None where there is none."""
    return next((family for family in _families() if model_type in family.MODEL_TYPES), None)


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest sequence a transformers model has positions for, by its family or else its config; None: any."""
    config = model.config
    family = of_type(config.model_type)
    return getattr(config, "max_position_embeddings", None) if family is None else family.most_tokens(config)


__all__ = ["COSTS", "Family", "Group", "Layer", "StockConfig", "Table", "most_tokens", "of", "of_type"]
