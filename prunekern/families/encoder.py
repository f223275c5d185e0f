"""What the encoder families share: their channel groups, and the compact linears of a block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linears import Make, dense_layer, full_or, padded_width
from .table import Group, Layer, Table, channels


@dataclass(frozen=True)
class Block:
    """Module names of the six linears of one encoder block."""

    q: str
    k: str
    v: str
    o: str
    up: str
    down: str


def encoder_table(model: nn.Module, blocks: Iterable[Block], heads: int) -> Table:
    """The table of method.md for blocks of plain multi-head attention and a two-layer FFN."""
    layers: dict[str, Layer] = {}
    groups: dict[str, Group] = {}

    for b in blocks:
        for name in (b.q, b.k, b.v, b.o, b.up, b.down):
            layers[name] = dense_layer(model, name)
        width, hidden, ffn = layers[b.q].rows, layers[b.o].rows, layers[b.up].rows
        head = torch.arange(width) // (width // heads)
        every = channels(width)
        groups[b.q] = Group("query_key", b.q, every, {b.k: every}, head=head, lives_by=b.v)
        groups[b.v] = Group("value", b.v, every, removed_cols={b.o: every}, head=head)
        groups[b.o] = Group("residual", b.o, channels(hidden))
        groups[b.up] = Group("ffn", b.up, channels(ffn), removed_cols={b.down: channels(ffn)})
        groups[b.down] = Group("residual", b.down, channels(layers[b.down].rows))
    return Table(layers, groups)


@dataclass(frozen=True)
class HeadLayout:
    """Where the kept channels of a layer's heads stand: side by side, and with each head padded to one width.

    Heads without a value channel are gone. Of kept query and key channels, head h has qk_first[h] to qk_first[h + 1];
    `query` are their sorted positions in [0, heads * width) when padded. `v_first` and `value`: the same for values.
    """

    heads: int
    width: int
    query: Tensor
    value: Tensor
    qk_first: tuple[int, ...]
    v_first: tuple[int, ...]


def head_layout(query_rows: Tensor, value_rows: Tensor, head_dim: int) -> HeadLayout:
    """query_rows, value_rows: kept rows of the dense projections (sorted int64)."""
    alive = torch.unique(value_rows // head_dim)  # sorted
    every = max((int(r.max()) // head_dim + 1 for r in (query_rows, value_rows) if r.numel()), default=0)
    query_counts, value_counts = (
        torch.bincount(r // head_dim, minlength=every)[alive] for r in (query_rows, value_rows)
    )
    width = padded_width(max([*query_counts.tolist(), *value_counts.tolist()], default=0), head_dim)

    def positions(rows: Tensor) -> Tensor:
        head = rows // head_dim
        first = torch.searchsorted(head, head)  # position of the first kept row of the same head
        rank = torch.arange(rows.numel()) - first
        return torch.searchsorted(alive, head) * width + rank

    qk_first, v_first = ((0, *c.cumsum(0).tolist()) for c in (query_counts, value_counts))
    return HeadLayout(alive.numel(), width, positions(query_rows), positions(value_rows), qk_first, v_first)


def compact_attention_linears(make: Make, plan, block: Block, head_dim: int):
    """q, k, v and o of one block, and its head layout.

    q, k and v scatter their channels into padded heads, for attention that wants heads of one width; o reads kept
    value channels side by side.
    """
    rows = {name: plan.layers[name].rows for name in (block.q, block.v)}
    layout = head_layout(rows[block.q], rows[block.v], head_dim)
    padded = layout.heads * layout.width
    hidden = plan.layers[block.o].out_features
    q, k = (make(n, None, full_or(layout.query, padded), padded, "none") for n in (block.q, block.k))
    v = make(block.v, None, full_or(layout.value, padded), padded, "none")
    o = make(block.o, None, full_or(plan.layers[block.o].rows, hidden), hidden, "none")
    return (q, k, v, o), layout


def compact_ffn_linears(make: Make, plan, block: Block, activation: str):
    """Both FFN layers: the first keeps its channels packed, the second scatters into the residual's width."""
    hidden = plan.layers[block.down].out_features
    up = make(block.up, None, None, plan.layers[block.up].rows.numel(), activation)
    down = make(block.down, None, full_or(plan.layers[block.down].rows, hidden), hidden, "none")
    return up, down
