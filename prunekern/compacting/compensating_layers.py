"""Every block linear of a model rounded to int4 with what its inputs tell: see `compensating`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.int4 import dequantize_weight_int4, quantize_weight_int4
from .compensating import compensated
from .listening import Listener
from .walking import walk

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
def compensated_layers(model: PreTrainedModel, batches: Iterable[Any], rows: int) -> dict[str, Int4]:
    """By name, the weights of all block linears that saw rows, rounded one block after another. The model's weights are
    what they were afterwards; while a block's inputs are made, those before it are rounded.
    """
    found: dict[str, Int4] = {}
    kept: dict[str, Tensor] = {}
    try:
        for block, look in walk(model, batches, rows):
            _put(model, kept)
            names = dict.fromkeys(n for n in (block.q, block.k, block.v, block.o, block.up, block.down) if n)
            names |= dict.fromkeys([block.gate] if getattr(block, "gate", None) else [])  # type: ignore[attr-defined]
            grams = [Gram(name, model.get_submodule(name), rows) for name in names]
            look(grams)
            kept = {}
            for gram in grams:
                weight: nn.Parameter = gram.module.weight  # type: ignore[assignment]
                if gram.sum is not None:
                    found[gram.name] = Int4(compensated(weight.detach(), gram.sum))
                    kept[gram.name] = weight.detach()
            rounded = {name: found[name].weight() for name in kept}
            kept = {name: w.clone() for name, w in kept.items()}
            _put(model, rounded)
    finally:
        _put(model, kept)
    return found


def _put(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        module: Any = model.get_submodule(name)
        module.weight.copy_(weight)
