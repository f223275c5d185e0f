"""How compact decoder blocks run: rotary attention on kept channels with a cache of nothing else, and the gated FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn import mlp_call, pick_channels, place_channels
from .blocks import is_hooked, is_shrunk
from .decoder import HeadLayout


class CompactCausalAttention:
    """Grouped-query attention on the kept channels: to be mixed into transformers' attention of a family.

    `forward` returns the kept channels of every query head side by side; the block adds o's product to the residual.
    The cache holds keys [batch, 1, tokens, kept key channels] and values [batch, 1, tokens, kept value channels], heads
    side by side: it is as much smaller as k and v are. Any cache of transformers takes them.
    """

    eager: Callable  # transformers' own attention for "eager"

    def make_compact(self, linears, layout: HeadLayout) -> None:
        """Take q, k, v and o of a block, in place of the dense ones."""
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linears
        self.layout = layout
        self._indices: dict[torch.device, tuple] = {}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> [batch, tokens, kept context], and attention weights or None."""
        at = self.layout
        shape = hidden_states.shape[:-1]
        if at.kv == 0:  # no value channel is left in the layer: o adds its bias to the residual
            nothing = hidden_states.new_zeros(*shape, 0)
            self._cached(nothing, nothing, past_key_values)
            return nothing, None
        turn, key_at, value_at, context_at = self._on(hidden_states.device)
        query = self.q_proj(hidden_states).view(*shape, at.kv, at.shared_by, at.width)
        key = self.k_proj(hidden_states).view(*shape, at.kv, at.width)
        value = self.v_proj(hidden_states).view(*shape, at.kv, at.width)
        query, key = self.normed(query, key)
        cos, sin = (
            c.index_select(-1, turn).view(*c.shape[:2], at.kv, at.width).to(key.dtype) for c in position_embeddings
        )
        query = _rotated(query, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3)
        key = _rotated(key, cos, sin)
        if past_key_values is not None:
            flat = (_side_by_side(t, index) for t, index in ((key, key_at), (value, value_at)))
            key, value = self._cached(*flat, past_key_values)
            key, value = (self._padded(t, index) for t, index in ((key, key_at), (value, value_at)))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.attention_dropout if self.training else 0.0
        window = self.window()
        if window is not None:
            kwargs["sliding_window"] = window
        heads = (t.transpose(1, 2) for t in (query, key, value))
        out, weights = interface(self, *heads, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*shape, at.kv * at.shared_by * at.width)
        return out.contiguous() if context_at is None else pick_channels(out, context_at), weights

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What a family does to queries and keys before they are turned: nothing."""
        return query, key

    def window(self) -> int | None:
        """Keys a query sees, where that is limited."""
        return None

    def _on(self, device: torch.device) -> tuple:
        """turn, and positions of key, value and context in padded heads (None where nothing is padded)."""
        if device not in self._indices:
            at, kv = self.layout, self.layout.kv * self.layout.width
            positions = ((at.key, kv), (at.value, kv), (at.context, kv * at.shared_by))
            found = (None if index.numel() == size else index.to(device) for index, size in positions)
            self._indices[device] = (at.turn.to(device), *found)
        return self._indices[device]

    def _cached(self, key: Tensor, value: Tensor, past) -> tuple[Tensor, Tensor]:
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

    def __getstate__(self):
        return {**self.__dict__, "_indices": {}}


class CompactDecoderLayer:
    """A block whose projections write into the residual directly: to be mixed into transformers' decoder layer."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        context, _ = attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = attention.o_proj(context, residual=hidden_states)
        x = self.post_attention_layernorm(hidden_states)
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if is_hooked(mlp, gate, up, down) or is_shrunk(gate, up, down):
            return hidden_states + mlp(x)
        return mlp_call(up, down, x, hidden_states, self.activation, gate)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel j with channel j + width / 2 turned by one angle. x: [..., width]; cos, sin broadcast to it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _side_by_side(x: Tensor, index: Tensor | None) -> Tensor:
    """[batch, tokens, kv, width] -> [batch, tokens, kept]."""
    x = x.flatten(2)
    return x if index is None else pick_channels(x, index)
