"""DeBERTa's attention on kept channels: by content and by relative position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from ...nn import CompactAttention, pick_channels
from ...nn.compact_attention import arithmetic_of
from ...nn.hooked import is_hooked
from ...nn.packed import Packed
from ...ops.compact_linear import compact_linear
from ...ops.disentangled_attention import disentangled_attention
from ..packs_together import PacksTogether
from .blocks import drops
from .deberta_given import Given, Known
from .heads import EncoderLayout


class _Tables:
    """Keys and queries of positions as a layer's weights make them, for sequences of up to `tokens` tokens."""

    __slots__ = ("tokens", "made_of", "key", "query")

    def __init__(self, tokens: int, made_of: tuple[Packed, Known], key: Tensor | None, query: Tensor | None):
        self.tokens, self.made_of, self.key, self.query = tokens, made_of, key, query

    def of(self, tokens: int) -> tuple[Tensor | None, Tensor | None]:
        """[2 tokens - 1, kept] each: a query's own place is in the middle, whatever the length."""
        rows = slice(self.tokens - tokens, self.tokens + tokens - 1)
        return None if self.key is None else self.key[rows], None if self.query is None else self.query[rows]


class CompactDisentangledSelfAttention(PacksTogether, hf.DisentangledSelfAttention):
    """In eval mode, on the CPU and where nothing wants a gradient, q, k and v are one product, the heads are never
    padded, and what the positions' embeddings become is kept until the weights it was made of change. Anything else
    (attention weights that are asked for, queries from elsewhere, other masks and positions, positions with layers of
    their own) runs on heads padded to the widest one.
    """

    names = ("query_proj", "key_proj", "value_proj")
    _tables: _Tables | None = None

    given: Given  # of the encoder
    # transformers' own
    dropout: nn.Module
    pos_dropout: nn.Module
    pos_att_type: list[str]
    position_buckets: int
    max_relative_positions: int
    pos_ebd_size: int
    attention_head_size: int
    relative_attention: bool
    share_att_key: bool

    def make_compact(self, linears: tuple[nn.Module, nn.Module, nn.Module], layout: EncoderLayout) -> None:
        """Take q, k and v of a block, in place of the dense ones."""
        for name, linear in zip(self.names, linears, strict=True):
            setattr(self, name, linear)
        self.terms = terms(self)
        # As transformers has it: the root is rounded to float32, whatever the model's dtype.
        squared = self.attention_head_size * (1 + len(terms(self, every=True)))
        self.scaling = 1.0 / float(torch.tensor(squared, dtype=torch.float32, device="cpu").sqrt())
        self.padded, self.value_at = (layout.heads, layout.width), layout.value
        self.ragged = CompactAttention(layout.qk_first, layout.v_first, self.scaling)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> [batch, tokens, kept value channels], attention weights or None."""
        x, asked = hidden_states, hidden_states if query_states is None else query_states
        if self.padded[0] == 0:  # no value channel is left in the layer: o adds its bias to the residual
            weights = x.new_zeros(len(x), 0, asked.shape[1], x.shape[1]) if output_attentions else None
            return x.new_zeros(*asked.shape[:-1], 0), weights
        if query_states is None and not output_attentions:
            y = self._attend_ragged(x, attention_mask, relative_pos, rel_embeddings)
            if y is not None:
                return y, None
        y, weights = self._attend_padded(x, asked, attention_mask, relative_pos, rel_embeddings)
        return y, weights if output_attentions else None

    def _attend_ragged(
        self, x: Tensor, mask: Tensor, relative_pos: Tensor | None, embeddings: Tensor | None
    ) -> Tensor | None:
        """None where the padded heads must do it."""
        layers = self._layers()
        if not self._runs_ragged(x, layers) or is_hooked(*layers, *self._dropouts()):
            return None
        is_of_tokens, tokens = self.given.tokens_of(mask)
        packed = self.ragged.packed_for(x, layers, True) if is_of_tokens else None
        if packed is None:
            return None
        key = query = None
        if self.terms:
            tables = self._tables_for(x.shape[1], packed, relative_pos, embeddings)
            if tables is None:
                return None
            key, query = tables.of(x.shape[1])
        q, k, v = self._product(x, packed)
        firsts = (self.ragged.qk_first, self.ragged.v_first)
        return disentangled_attention(q, k, v, *firsts, key, query, tokens, self.scaling, arithmetic_of(layers))

    def _product(self, x: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        """q, k and v of x, kept channels only."""
        keys, values = self.ragged.qk_first[-1], self.ragged.v_first[-1]
        y = compact_linear(x, packed.weight, packed.bias, None, None, 2 * keys + values, "none", None, packed.scale,
                           packed.activations)  # fmt: skip
        return y.split_with_sizes((keys, keys, values), -1)

    def _tables_for(
        self, tokens: int, packed: Packed, relative_pos: Tensor | None, embeddings: Tensor | None
    ) -> _Tables | None:
        known = self.given.embeddings
        if known is None or embeddings is None or not known.is_still(embeddings) or not self.share_att_key:
            return None
        if not self.given.is_plain(relative_pos, tokens):
            return None
        tables = self._tables
        if tables is None or tables.tokens < tokens or tables.made_of != (packed, known):
            longest = tokens if tables is None else max(tables.tokens, tokens)
            with torch.inference_mode(False), torch.no_grad():
                rows = embeddings.detach().index_select(0, self._position_rows(longest))
                q, k, _ = self._product(rows.unsqueeze(0), packed)  # [1, 2 longest - 1, kept]
                key, query = (t[0].contiguous() if name in self.terms else None for t, name in ((k, "c2p"), (q, "p2c")))
            tables = self._tables = _Tables(longest, (packed, known), key, query)
        return tables

    def _position_rows(self, tokens: int) -> Tensor:
        """Rows of the embeddings, int64 [2 tokens - 1]: of keys from tokens - 1 after to tokens - 1 before a query."""
        steps = torch.arange(1 - tokens, tokens, device="cpu")
        if self.position_buckets > 0 and self.max_relative_positions > 0:
            steps = hf.make_log_bucket_position(steps, self.position_buckets, self.max_relative_positions).long()
        return (steps + self.pos_ebd_size).clamp(0, 2 * self.pos_ebd_size - 1)

    def _attend_padded(
        self, x: Tensor, asked: Tensor, mask: Tensor, relative_pos: Tensor | None, embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Padding is zero in q, k and v: it changes no logit, and its outputs are dropped. The softmax scale stays that
        of the dense head.
        """
        layers = self._layers()
        # Before the content: who listens to layers that make both hears last what the layer's result is made of.
        keys, queries = self._positions(embeddings)
        q, k, v = (self._by_head(layer(t)) for layer, t in zip(layers, (asked, x, x), strict=True))
        q = q * self.scaling
        logits = q @ k.transpose(-1, -2)  # [batch, heads, queries, keys]
        if self.terms:
            if relative_pos is None:
                relative_pos = hf.build_relative_position(
                    q, k, bucket_size=self.position_buckets, max_position=self.max_relative_positions
                )
            logits = logits + self._position_logits(q, k, relative_pos, keys, queries)
        logits = logits.masked_fill(~mask.bool(), torch.finfo(logits.dtype).min)
        weights = self.dropout(logits.softmax(-1))
        out = (weights @ v).transpose(1, 2).flatten(2)
        kept = getattr(layers[2], "out_index", self.value_at)
        return out.contiguous() if kept is None else pick_channels(out, kept.to(out.device)), weights

    def _positions(self, embeddings: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Keys and queries of positions, [1, heads, positions, width]; None for a term that is not there."""
        if not self.terms:
            return None, None
        assert embeddings is not None  # where there are terms there is relative attention
        embeddings = self.pos_dropout(embeddings)[: 2 * self.pos_ebd_size].unsqueeze(0)
        names = ("key_proj", "query_proj") if self.share_att_key else ("pos_key_proj", "pos_query_proj")
        keys, queries = (
            self._by_head(self._modules[name](embeddings)) if term in self.terms else None
            for name, term in zip(names, ("c2p", "p2c"), strict=True)
        )
        return keys, queries

    def _position_logits(
        self, q: Tensor, k: Tensor, relative_pos: Tensor, keys: Tensor | None, queries: Tensor | None
    ) -> Tensor:
        """What positions add to the logits, [batch, heads, queries, keys]; q is scaled."""
        while relative_pos.dim() < 4:
            relative_pos = relative_pos.unsqueeze(0)
        span, logits = self.pos_ebd_size, torch.zeros((), dtype=q.dtype, device=q.device)
        relative_pos = relative_pos.to(q.device, torch.int64)
        if keys is not None:
            row = (relative_pos + span).clamp(0, 2 * span - 1)
            by_position = q @ keys.transpose(-1, -2)  # [batch, heads, queries, positions]
            logits = logits + by_position.gather(-1, row.expand(*q.shape[:2], -1, -1))
        if queries is not None:
            row = (span - relative_pos).clamp(0, 2 * span - 1)
            by_position = k @ (queries * self.scaling).transpose(-1, -2)  # [batch, heads, keys, positions]
            logits = logits + by_position.gather(-1, row.expand(*q.shape[:2], -1, -1)).transpose(-1, -2)
        return logits

    def _by_head(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads width] -> [batch, heads, tokens, width]."""
        return x.view(*x.shape[:-1], *self.padded).transpose(1, 2)

    def _dropouts(self) -> tuple[nn.Module, ...]:
        return (self.dropout, self.pos_dropout) if self.relative_attention else (self.dropout,)

    def _is_plain(self) -> bool:
        return not any(drops(dropout) for dropout in self._dropouts())

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return {**self.__dict__, "_tables": None}


def terms(of: Any, every: bool = False) -> tuple[str, ...]:
    """Which positions an attention module, or a config, adds to its logits: of "c2p" (keys of positions), "p2c"
    (queries of positions). every: those the logits' scale counts, which transformers does without relative attention,
    too.
    """
    named = tuple(t for t in ("c2p", "p2c") if t in (of.pos_att_type or ()))
    return named if of.relative_attention or every else ()
