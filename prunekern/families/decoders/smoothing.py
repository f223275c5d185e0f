"""Where in a decoder block a channel may be scaled down by what makes it, and up by what reads it: nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..family import Kept
from .llama import blocks
from .table import heads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Smoothing:
    """Channels between `made` and `readers`.

    made: parameters whose first dimension is these channels. readers: module names of the linears that read them, all
    the same columns. at: int64 [columns], the channel that each column reads; None: its own number's.
    """

    made: tuple[nn.Parameter, ...]
    readers: tuple[str, ...]
    at: Tensor | None = None


def smoothings(model: PreTrainedModel, kept: Kept) -> Iterator[Smoothing]:
    """All of a compact model. A norm has its weight in each channel; `up` is a factor of what `down` reads; value
    channels go through attention one by one, to all query heads that read their key/value head.

    (Not so in encoders: what their norms make is the residual too, and their activation is not linear.)
    """
    heads = heads_of(model)
    for module, names in blocks(model):
        block: Any = module
        first, second = block.input_layernorm, block.post_attention_layernorm
        yield Smoothing((first.weight,), (names.q, names.k, names.v))
        yield Smoothing((second.weight,), (names.up, names.gate))
        yield Smoothing(_parameters(model, names.up), (names.down,))
        column, rows = kept.layers[names.o].cols, kept.layers[names.v].rows
        channel = column // heads.dim // heads.shared_by * heads.dim + column % heads.dim  # of the dense v
        yield Smoothing(_parameters(model, names.v), (names.o,), torch.searchsorted(rows, channel))


def _parameters(model: PreTrainedModel, name: str) -> tuple[nn.Parameter, ...]:
    layer = model.get_submodule(name)
    return tuple(p for p in (layer.weight, layer.bias) if p is not None)
