"""Where the kept channels of a decoder block stand, and the compact linears that put them there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..family import Kept
from ..linears import Make, Projections, full_or, padded_width
from .table import DecoderBlock, DecoderHeads


@dataclass(frozen=True)
class DecoderLayout:
    """Where the kept channels of a layer stand: side by side as the cache holds them, and in heads of one width.

    `kv` key/value heads are left, each read by `shared_by` query heads, padded to `width` (even): first halves of
    rotary pairs from the head's start, second halves from its middle, values from its start. `query`, `key`, `value`
    are the sorted positions of kept channels when padded, `context` those of what the output projection reads.
    `turn` int64 [kv * width]: the channel of the model's cos and sin that turns each padded key channel; `angle` int64
    [key_first[-1] / 2]: the same for each kept pair. `key_first`, `value_first`: kv + 1 ints, key/value head h has
    channels first[h] to first[h + 1] side by side.
    """

    kv: int
    shared_by: int
    width: int
    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor
    turn: Tensor
    angle: Tensor
    key_first: tuple[int, ...]
    value_first: tuple[int, ...]


def decoder_layout(key_rows: Tensor, value_rows: Tensor, heads: DecoderHeads) -> DecoderLayout:
    """key_rows, value_rows: kept rows of the dense projections (sorted int64)."""
    d, half, shared = heads.dim, heads.dim // 2, heads.shared_by
    alive = torch.unique(value_rows // d) if heads.prunes_pairs else torch.arange(heads.kv, device="cpu")
    kv = alive.numel()
    pairs = key_rows[key_rows % d < half]  # first halves stand for their pair
    pair_counts, value_counts = (torch.bincount(r // d, minlength=heads.kv)[alive] for r in (pairs, value_rows))
    widest = max([2 * n for n in pair_counts.tolist()] + value_counts.tolist(), default=0)
    width = padded_width(widest, d) if heads.prunes_pairs else d

    def positions(rows: Tensor) -> Tensor:
        head = rows // d
        rank = torch.arange(rows.numel(), device="cpu") - torch.searchsorted(head, head)  # within its head
        return torch.searchsorted(alive, head) * width + rank

    first_half, value = positions(pairs), positions(value_rows)
    key = torch.cat([first_half, first_half + width // 2]).sort().values
    turn = torch.zeros(kv * width, dtype=torch.int64, device="cpu")
    turn[first_half] = pairs % d
    turn[first_half + width // 2] = pairs % d + half
    return DecoderLayout(
        kv,
        shared,
        width,
        _for_queries(key, width, shared),
        key,
        value,
        _for_queries(value, width, shared),
        turn,
        pairs % d,
        (0, *(2 * pair_counts).cumsum(0).tolist()),
        (0, *value_counts.cumsum(0).tolist()),
    )


def _for_queries(position: Tensor, width: int, shared: int) -> Tensor:
    """Positions in key/value heads -> the same in every query head that reads them, sorted."""
    head, within = position // max(width, 1), position % max(width, 1)
    every = (head[:, None] * shared + torch.arange(shared, device="cpu")) * width + within[:, None]
    return every.flatten().sort().values


def compact_decoder_attention(
    make: Make, plan: Kept, block: DecoderBlock, heads: DecoderHeads
) -> tuple[Projections, DecoderLayout]:
    """q, k, v and o of one block, and its head layout.

    q, k and v scatter their channels into padded heads; o reads what is kept of every query head side by side.
    """
    layout = decoder_layout(plan.layers[block.k].rows, plan.layers[block.v].rows, heads)
    kv, queries = layout.kv * layout.width, layout.kv * layout.shared_by * layout.width
    hidden = plan.layers[block.o].out_features
    q = make(block.q, None, full_or(layout.query, queries), queries, "none")
    k = make(block.k, None, full_or(layout.key, kv), kv, "none")
    v = make(block.v, None, full_or(layout.value, kv), kv, "none")
    o = make(block.o, None, full_or(plan.layers[block.o].rows, hidden), hidden, "none")
    return (q, k, v, o), layout


def compact_decoder_ffn(make: Make, plan: Kept, block: DecoderBlock) -> tuple[nn.Module, nn.Module, nn.Module]:
    """gate, up and down: the first two keep their channels packed, the last scatters into the residual's width."""
    hidden = plan.layers[block.down].out_features
    gate, up = (make(n, None, None, plan.layers[n].rows.numel(), "none") for n in (block.gate, block.up))
    return gate, up, make(block.down, None, full_or(plan.layers[block.down].rows, hidden), hidden, "none")
