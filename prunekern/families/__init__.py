"""What prunekern knows of architectures, one file each. `of(model)` finds the family of a model.

A family is a module with MODEL_TYPES, `table(model)` (layers and channel groups) and `rebuild(model, plan, make)`.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from .table import Group, Layer, Table


def _families() -> tuple[ModuleType, ...]:
    from . import bert, distilbert, llama

    return distilbert, bert, llama


def of(model: nn.Module) -> ModuleType:
    """The family of a transformers model. ValueError for an architecture without one."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = {t: family for family in _families() for t in family.MODEL_TYPES}
    if model_type not in known:
        what = f"model type {model_type!r}" if model_type else "it is no transformers model"
        raise ValueError(f"model: {type(model).__name__} has no family ({what}); accepted: {', '.join(sorted(known))}")
    return known[model_type]


__all__ = ["Group", "Layer", "Table", "of"]
