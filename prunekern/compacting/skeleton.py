"""A dense model in the shape of a compact one, before its weights are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import families
from ..nn import CompactLinear
from .plan import Plan


def skeleton(model: nn.Module, plan: Plan) -> None:
    """Give a dense model the compact structure of `plan`, in place, weights unset (on the meta device)."""

    def make(
        name: str, in_index: Tensor | None, out_index: Tensor | None, out_features: int, activation: str
    ) -> CompactLinear:
        layer, dense = plan.layers[name], model.get_parameter(f"{name}.weight")
        weight = torch.empty(layer.rows.numel(), layer.cols.numel(), dtype=dense.dtype, device="meta")
        bias = torch.empty(layer.rows.numel(), dtype=dense.dtype, device="meta") if layer.bias else None
        return CompactLinear(weight, bias, in_index, out_index, out_features, activation)

    families.split(model)
    families.of(model).rebuild(model, plan, make)
