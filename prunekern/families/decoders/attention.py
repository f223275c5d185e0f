"""How the attention of compact decoder blocks runs: rotary, on kept channels, with a cache of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn import CompactAttention, pick_channels, place_channels
from ...nn.compact_attention import arithmetic_of
from ...ops import rotate_pairs
from ..key_masks import causal_key_mask_of, for_each, key_mask_of
from ..linears import Projections
from ..packs_together import PacksTogether
from .heads import DecoderLayout

if TYPE_CHECKING:
    from transformers import Cache

Positions = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Turns = tuple[Tensor, Tensor]  # cos and sin, [batch, tokens, head_dim]


class CompactCausalAttention(PacksTogether):
    """Grouped-query attention on the kept channels: to be mixed into transformers' attention of a family.

    With "sdpa" attention (the default), on the CPU and where nothing wants a gradient, q, k and v are one product and
    heads are never padded. Everything else (see `CompactSelfAttention`) takes transformers' attention on heads padded
    to the widest one.

    `attend` returns the kept channels of every query head side by side, for the block to add o's product to the
    residual in one call; `forward` what transformers' does.
    The cache holds keys [batch, 1, tokens, kept key channels] and values [batch, 1, tokens, kept value channels], heads
    side by side: it is as much smaller as k and v are. Any cache of transformers takes them.
    """

    names = ("q_proj", "k_proj", "v_proj")
    eager: Callable[..., tuple[Tensor, Tensor | None]]  # transformers' own attention for "eager"
    norms_heads = False  # whether `normed` does anything
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    attention_dropout: float
    is_causal: bool
    layer_idx: int
    scaling: float

    def make_compact(self, linears: Projections, layout: DecoderLayout) -> None:
        """Take q, k, v and o of a block, in place of the dense ones."""
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linears
        self.layout = layout
        self.ragged = CompactAttention(
            layout.key_first, layout.value_first, self.scaling, layout.shared_by, causal=True
        )
        self._indices: dict[torch.device, Positions] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> the same, and attention weights or None."""
        context, weights = self.attend(hidden_states, *args, **kwargs)
        return self.o_proj(context), weights

    def attend(
        self,
        hidden_states: Tensor,
        position_embeddings: Turns,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> [batch, tokens, kept context], and attention weights or None."""
        if self.layout.kv == 0:  # no value channel is left in the layer: o adds its bias to the residual
            if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
                raise ValueError(
                    f"output_attentions must be False (got True): block {self.layer_idx} of this compact model has no "
                    "attention head left, and every later block's weights would stand in the wrong place"
                )
            nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
            self._cached(nothing, nothing, past_key_values)
            return nothing, None
        if self._runs_ragged(hidden_states, self._layers()):
            asked = kwargs.get("is_causal")  # False: a decoder as an encoder, of embeddings say
            causal = self.is_causal if asked is None else bool(asked)
            is_plain, key_mask = (causal_key_mask_of if causal else key_mask_of)(attention_mask)
            if is_plain:
                key_mask = for_each(key_mask, len(hidden_states))
                y = self._attend_ragged(hidden_states, position_embeddings, key_mask, past_key_values, causal)
                return y, None
        return self._attend_padded(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    def _attend_ragged(
        self, x: Tensor, position_embeddings: Turns, key_mask: Tensor | None, past: Cache | None, causal: bool
    ) -> Tensor:
        at, ragged = self.layout, self.ragged
        query, key, value = ragged.project(x, self._layers(), fuses=True)
        query, key = self.normed(query, key)
        cos, sin = position_embeddings
        query = rotate_pairs(query, cos, sin, at.angle, at.key_first, at.shared_by)
        key = rotate_pairs(key, cos, sin, at.angle, at.key_first)
        key, value = self._cached(key, value, past)
        if causal and key_mask is None and x.shape[1] > 1:
            # No mask for several tokens says that they are the first ones; a static cache holds empty slots after them.
            key, value = key[:, : x.shape[1]], value[:, : x.shape[1]]
        return ragged.attend(query, key, value, key_mask, arithmetic_of(self._layers()), causal)

    def _attend_padded(
        self, x: Tensor, position_embeddings: Turns, mask: Tensor | None, past: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        at = self.layout
        shape = x.shape[:-1]
        turn, key_at, value_at, context_at = self._on(x.device)
        query, key, value = (layer(x) for layer in self._layers())
        query, key = self.normed(query, key)
        query = query.view(*shape, at.kv, at.shared_by, at.width)
        key, value = (t.view(*shape, at.kv, at.width) for t in (key, value))
        cos, sin = (
            c.index_select(-1, turn).view(*c.shape[:2], at.kv, at.width).to(key.dtype) for c in position_embeddings
        )
        query = _rotated(query, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3)
        key = _rotated(key, cos, sin)
        if past is not None:
            key, value = self._cached(_side_by_side(key, key_at), _side_by_side(value, value_at), past)
            key, value = (self._padded(t, index) for t, index in ((key, key_at), (value, value_at)))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        window = self.window()
        if window is not None:
            kwargs["sliding_window"] = window
        heads = (t.transpose(1, 2) for t in (query, key, value))
        out, weights = interface(self, *heads, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*shape, at.kv * at.shared_by * at.width)
        return out.contiguous() if context_at is None else pick_channels(out, context_at), weights

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What a family does to queries and keys [batch, tokens, channels] before they are turned: nothing."""
        return query, key

    def _dropout_rate(self) -> float:
        return self.attention_dropout

    def window(self) -> int | None:
        """Keys a query sees, where that is limited."""
        return None

    def _on(self, device: torch.device) -> Positions:
        """turn, and positions of key, value and context in padded heads (None where nothing is padded)."""
        if device not in self._indices:
            at, kv = self.layout, self.layout.kv * self.layout.width
            positions = ((at.key, kv), (at.value, kv), (at.context, kv * at.shared_by))
            key, value, context = (None if index.numel() == size else index.to(device) for index, size in positions)
            self._indices[device] = (at.turn.to(device), key, value, context)
        return self._indices[device]

    def _cached(self, key: Tensor, value: Tensor, past: Cache | None) -> tuple[Tensor, Tensor]:
        """Those of all tokens so far, [batch, tokens, kept]."""
        if past is None:
            return key, value
        # A cache counts its tokens by keys, and takes one without any element for empty: keep one channel of zeros.
        stored = (t if t.shape[-1] else t.new_zeros(*t.shape[:-1], 1) for t in (key, value))
        keys, values = past.update(*(t.unsqueeze(1) for t in stored), self.layer_idx)
        return keys[:, 0, :, : key.shape[-1]], values[:, 0, :, : value.shape[-1]]

    def _padded(self, flat: Tensor, index: Tensor | None) -> Tensor:
        """[batch, tokens, kept] -> [batch, tokens, kv, width]."""
        at = self.layout
        if index is not None:
            flat = place_channels(flat, index, at.kv * at.width)
        return flat.reshape(*flat.shape[:2], at.kv, at.width)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel j with channel j + width / 2 turned by one angle. x: [..., width]; cos, sin broadcast to it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _side_by_side(x: Tensor, index: Tensor | None) -> Tensor:
    """[batch, tokens, kv, width] -> [batch, tokens, kept]."""
    x = x.flatten(2)
    return x if index is None else pick_channels(x, index)
