"""The channel groups of encoder blocks: plain multi-head attention and a two-layer FFN."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..linears import dense_layer
from ..table import Group, Layer, Table, channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EncoderBlock:
    """Module names of the six linears of one encoder block."""

    q: str
    k: str
    v: str
    o: str
    up: str
    down: str


def encoder_table(model: PreTrainedModel, blocks: Iterable[EncoderBlock], heads: int) -> Table:
    """The table (docs/how-it-works.md) for blocks of plain multi-head attention and a two-layer FFN."""
    layers: dict[str, Layer] = {}
    groups: dict[str, Group] = {}

    for b in blocks:
        for name in (b.q, b.k, b.v, b.o, b.up, b.down):
            layers[name] = dense_layer(model, name)
        width, hidden, ffn = layers[b.q].rows, layers[b.o].rows, layers[b.up].rows
        head = torch.arange(width, device="cpu") // (width // heads)
        every = channels(width)
        groups[b.q] = Group("query_key", b.q, every, {b.k: every}, head=head, lives_by=b.v)
        groups[b.v] = Group("value", b.v, every, removed_cols={b.o: every}, head=head)
        groups[b.o] = Group("residual", b.o, channels(hidden))
        groups[b.up] = Group("ffn", b.up, channels(ffn), removed_cols={b.down: channels(ffn)})
        groups[b.down] = Group("residual", b.down, channels(layers[b.down].rows))
    return Table(layers, groups)
