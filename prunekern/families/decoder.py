"""What the decoder families share: channel groups of grouped-query attention with rotary positions and of a gated
FFN, and the compact linears of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .linears import Make, dense_layer, full_or, padded_width
from .table import Group, Layer, Table, channels

# Rotary embeddings whose channel j is turned together with channel j + head_dim / 2, at a frequency of their own.
ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Block:
    """Module names of the seven linears of one decoder block."""

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads and channels of each. `prunes_pairs`: whether query/key channels may go.

    Where they may not (a norm over a whole head reads them), no head vanishes either.
    """

    query: int
    kv: int
    dim: int
    prunes_pairs: bool = True

    @property
    def shared_by(self) -> int:
        """Query heads of one key/value head."""
        return self.query // self.kv


def heads_of(model: nn.Module, prunes_pairs: bool = True) -> Heads:
    """Of a model's config. ValueError for a rotary embedding whose pairs are not known."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    if kind not in ROTARY:
        raise ValueError(
            f"{type(model).__name__}: rope_type must be one of {', '.join(ROTARY)}, whose rotary pairs are known "
            f"(got {kind!r})"
        )
    if share != 1.0 or dim % 2:
        raise ValueError(
            f"{type(model).__name__}: every channel of a head must be of a rotary pair "
            f"(got partial_rotary_factor {share}, head_dim {dim})"
        )
    return Heads(config.num_attention_heads, config.num_key_value_heads, dim, prunes_pairs)


def decoder_table(model: nn.Module, blocks: Iterable[Block], heads: Heads) -> Table:
    """The table of method.md for blocks of grouped-query attention, rotary positions and a gated FFN."""
    layers: dict[str, Layer] = {}
    groups: dict[str, Group] = {}
    d, half, shared = heads.dim, heads.dim // 2, heads.shared_by
    kv_head = torch.arange(heads.kv)
    query_head = kv_head[:, None] * shared + torch.arange(shared)  # [kv, shared]: those that read a key/value head
    pair = torch.arange(half)[:, None] + torch.tensor([0, half])  # [half, 2]
    every = torch.arange(d)
    # Pair j of key/value head g, in k and in every query head that reads it.
    in_k = (kv_head[:, None, None] * d + pair).reshape(-1, 2)  # [kv * half, 2]
    in_q = (query_head[:, None, :, None] * d + pair[:, None, :]).reshape(-1, 2 * shared)
    in_o = (query_head[:, None, :] * d + every[:, None]).reshape(-1, shared)  # [kv * d, shared]
    for b in blocks:
        for name in (b.q, b.k, b.v, b.o, b.gate, b.up, b.down):
            layers[name] = dense_layer(model, name)
        ffn, hidden = channels(layers[b.up].rows), channels(layers[b.o].rows)
        value_head = kv_head.repeat_interleave(d)
        if heads.prunes_pairs:
            pair_head = kv_head.repeat_interleave(half)
            groups[b.q] = Group("query_key", b.q, in_q, {b.k: in_k}, head=pair_head, lives_by=b.v)
        groups[b.v] = Group("value", b.v, channels(heads.kv * d), removed_cols={b.o: in_o}, head=value_head)
        groups[b.o] = Group("residual", b.o, hidden)
        groups[b.up] = Group("ffn", b.up, ffn, {b.gate: ffn}, removed_cols={b.down: ffn})
        groups[b.down] = Group("residual", b.down, hidden)
    return Table(layers, groups)


@dataclass(frozen=True)
class HeadLayout:
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


def head_layout(key_rows: Tensor, value_rows: Tensor, heads: Heads) -> HeadLayout:
    """key_rows, value_rows: kept rows of the dense projections (sorted int64)."""
    d, half, shared = heads.dim, heads.dim // 2, heads.shared_by
    alive = torch.unique(value_rows // d) if heads.prunes_pairs else torch.arange(heads.kv)
    kv = alive.numel()
    pairs = key_rows[key_rows % d < half]  # first halves stand for their pair
    pair_counts, value_counts = (torch.bincount(r // d, minlength=heads.kv)[alive] for r in (pairs, value_rows))
    widest = max([2 * n for n in pair_counts.tolist()] + value_counts.tolist(), default=0)
    width = padded_width(widest, d) if heads.prunes_pairs else d

    def positions(rows: Tensor) -> Tensor:
        head = rows // d
        rank = torch.arange(rows.numel()) - torch.searchsorted(head, head)  # within its head
        return torch.searchsorted(alive, head) * width + rank

    first_half, value = positions(pairs), positions(value_rows)
    key = torch.cat([first_half, first_half + width // 2]).sort().values
    turn = torch.zeros(kv * width, dtype=torch.int64)
    turn[first_half] = pairs % d
    turn[first_half + width // 2] = pairs % d + half
    return HeadLayout(
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
    every = (head[:, None] * shared + torch.arange(shared)) * width + within[:, None]
    return every.flatten().sort().values


def compact_attention_linears(make: Make, plan, block: Block, heads: Heads):
    """q, k, v and o of one block, and its head layout.

    q, k and v scatter their channels into padded heads; o reads what is kept of every query head side by side.
    """
    layout = head_layout(plan.layers[block.k].rows, plan.layers[block.v].rows, heads)
    kv, queries = layout.kv * layout.width, layout.kv * layout.shared_by * layout.width
    hidden = plan.layers[block.o].out_features
    q = make(block.q, None, full_or(layout.query, queries), queries, "none")
    k = make(block.k, None, full_or(layout.key, kv), kv, "none")
    v = make(block.v, None, full_or(layout.value, kv), kv, "none")
    o = make(block.o, None, full_or(plan.layers[block.o].rows, hidden), hidden, "none")
    return (q, k, v, o), layout


def compact_ffn_linears(make: Make, plan, block: Block):
    """gate, up and down: the first two keep their channels packed, the last scatters into the residual's width."""
    hidden = plan.layers[block.down].out_features
    gate, up = (make(n, None, None, plan.layers[n].rows.numel(), "none") for n in (block.gate, block.up))
    return gate, up, make(block.down, None, full_or(plan.layers[block.down].rows, hidden), hidden, "none")
