"""The masked model without the channels that its final masks removed, in place: what `Pruner.shrink` does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import families, ops
from ..compacting.plan import Plan
from ..nn import MaskedDoRALinear, shrink_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_norms(layers: Mapping[str, MaskedDoRALinear]) -> dict[str, float]:
    """Sum of squares of every layer's frozen weight as it is, by module name; layers without storage are left out."""
    norms = {n: ops.row_sqnorm(m.weight).double().sum() for n, m in layers.items() if not m.weight.is_meta}
    return dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True)) if norms else {}


@torch.no_grad()
def shrink_model(model: PreTrainedModel, plan: Plan, state: dict[Any, Any] | None = None) -> None:
    """Each block linear on its kept rows and columns. state: of an optimiser, whose moments follow the parameters."""

    def make(name: str, in_index: Tensor | None, out_index: Tensor | None, out_features: int, activation: str) -> Any:
        kept = plan.layers[name]
        layer = shrink_linear(model.get_submodule(name), kept.rows, kept.cols, state)
        layer.take_place(out_index, out_features, activation, in_index)
        return layer

    families.of(model).rebuild(model, plan, make)
