"""Which parameters are trained, where a user has frozen or thawed what `attach` left otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..nn import MaskedDoRALinear
from .attach import task_head


def other_flags(model: nn.Module) -> dict[str, list[str]]:
    """Names of what was frozen or made trainable other than `attach` does, and than final masks are."""
    usual = _trained_by_attach(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters() if not n.endswith(".mask.logits")}
    return {
        "frozen": sorted(n for n, on in flags.items() if not on and n in usual),
        "thawed": sorted(n for n, on in flags.items() if on and n not in usual),
    }


def _trained_by_attach(model: nn.Module) -> set[str]:
    head = {id(p) for p in task_head(model)}
    names = {n for n, p in model.named_parameters() if id(p) in head}
    for name, module in model.named_modules():
        if isinstance(module, MaskedDoRALinear):
            names |= {f"{name}.{leaf}" for leaf in ("A", "B", "magnitude")}
    return names


def set_flags(model: nn.Module, config: Mapping[str, Any]) -> None:
    """What `other_flags` gave, on a model that `attach` has left."""
    for name, parameter in model.named_parameters():
        if name in config["frozen"] or name in config["thawed"]:
            parameter.requires_grad_(name in config["thawed"])
