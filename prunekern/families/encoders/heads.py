"""Where the kept channels of an encoder block stand, and the compact linears that put them there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..family import Kept
from ..linears import Make, Projections, full_or, padded_width
from .table import EncoderBlock


@dataclass(frozen=True)
class EncoderLayout:
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


def encoder_layout(query_rows: Tensor, value_rows: Tensor, head_dim: int) -> EncoderLayout:
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
        rank = torch.arange(rows.numel(), device="cpu") - first
        return torch.searchsorted(alive, head) * width + rank

    qk_first, v_first = ((0, *c.cumsum(0).tolist()) for c in (query_counts, value_counts))
    return EncoderLayout(alive.numel(), width, positions(query_rows), positions(value_rows), qk_first, v_first)


def compact_encoder_attention(
    make: Make, plan: Kept, block: EncoderBlock, head_dim: int
) -> tuple[Projections, EncoderLayout]:
    """q, k, v and o of one block, and its head layout.

    q, k and v scatter their channels into padded heads, for attention that wants heads of one width; o reads kept
    value channels side by side.
    """
    rows = {name: plan.layers[name].rows for name in (block.q, block.v)}
    layout = encoder_layout(rows[block.q], rows[block.v], head_dim)
    padded = layout.heads * layout.width
    hidden = plan.layers[block.o].out_features
    q, k = (make(n, None, full_or(layout.query, padded), padded, "none") for n in (block.q, block.k))
    v = make(block.v, None, full_or(layout.value, padded), padded, "none")
    o = make(block.o, None, full_or(plan.layers[block.o].rows, hidden), hidden, "none")
    return (q, k, v, o), layout


def compact_encoder_ffn(make: Make, plan: Kept, block: EncoderBlock) -> tuple[nn.Module, nn.Module]:
    """Both FFN layers: the first keeps its channels packed, the second scatters into the residual's width."""
    hidden = plan.layers[block.down].out_features
    up = make(block.up, None, None, plan.layers[block.up].rows.numel(), "none")
    down = make(block.down, None, full_or(plan.layers[block.down].rows, hidden), hidden, "none")
    return up, down
