"""Every block linear of a model rounded to int4 with what its inputs tell: see `compensating`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.int4 import dequantize_weight_int4, quantize_weight_int4
from .compensating import compensated
from .listening import Inputs, Listener
from .walking import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int4:
    """A weight [N, K] as it is held in int4."""

    def __init__(self, weight: Tensor):
        self.inputs = weight.shape[1]
        self.codes, self.scale = quantize_weight_int4(weight)

    def weight(self) -> Tensor:
        """[N, K] float32."""
        return dequantize_weight_int4(self.codes, self.scale, self.inputs)


class Gram(Listener):
    """x^T x of what a layer reads, `sum` [K, K]; None before it saw any. Every row counts alike, whatever its size:
    the first token of a text is a hundred times as large as the others.
    """

    sum: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """See `Listener`."""
        x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.sum = x.t() @ x if self.sum is None else self.sum.addmm_(x.t(), x)


@torch.no_grad()
def compensated_layers(
    model: PreTrainedModel, batches: Iterable[Any], rows: int
) -> tuple[dict[str, Int4], list[Inputs]]:
    """By name, the weights of all block linears that saw rows, rounded one block after another. The model's weights are
    what they were afterwards; while a block's inputs are made, those before it are rounded.
    """
    found: dict[str, Int4] = {}
    walk = Walk(model, batches, rows)
    for block in walk.blocks:
        names = [getattr(block.names, part, None) for part in ("q", "k", "v", "o", "gate", "up", "down")]
        grams = [Gram(name, model.get_submodule(name), rows) for name in names if name is not None]
        walk.look(block, grams)
        weights: dict[str, Tensor] = {g.name: g.module.weight for g in grams if g.sum is not None}  # type: ignore[misc]
        for gram in grams:
            if gram.sum is not None:
                found[gram.name] = Int4(compensated(weights[gram.name], gram.sum))
        before = {name: weight.clone() for name, weight in weights.items()}
        try:
            put(model, {name: found[name].weight() for name in weights})
            walk.pass_on(block)
        finally:
            put(model, before)
    return found, walk.used


@torch.no_grad()
def put(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Write weights, by layer, over those of the model."""
    for name, weight in weights.items():
        module: Any = model.get_submodule(name)
        module.weight.copy_(weight)
