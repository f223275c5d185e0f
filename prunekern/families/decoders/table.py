"""The channel groups of decoder blocks: grouped-query attention with rotary positions and a gated FFN."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..linears import dense_layer
from ..table import Group, Layer, Table, channels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rotary embeddings whose channel j is turned together with channel j + head_dim / 2, at a frequency of their own.
ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class DecoderBlock:
    """Module names of the seven linears of one decoder block."""

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class DecoderHeads:
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


def heads_of(model: PreTrainedModel, prunes_pairs: bool = True) -> DecoderHeads:
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
    return DecoderHeads(config.num_attention_heads, config.num_key_value_heads, dim, prunes_pairs)


def decoder_table(model: PreTrainedModel, blocks: Iterable[DecoderBlock], heads: DecoderHeads) -> Table:
    """The table (docs/how-it-works.md) for blocks of grouped-query attention, rotary positions and a gated FFN."""
    layers: dict[str, Layer] = {}
    groups: dict[str, Group] = {}
    d, half, shared = heads.dim, heads.dim // 2, heads.shared_by
    kv_head = torch.arange(heads.kv, device="cpu")
    # [kv, shared]: those that read a key/value head
    query_head = kv_head[:, None] * shared + torch.arange(shared, device="cpu")
    pair = torch.arange(half, device="cpu")[:, None] + torch.tensor([0, half], device="cpu")  # [half, 2]
    every = torch.arange(d, device="cpu")
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
