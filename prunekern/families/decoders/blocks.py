"""How compact decoder blocks run: rotary attention on kept channels with a cache of nothing else, and the gated FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn import CompactAttention, mlp_call, pick_channels, place_channels
from ...nn.hooked import is_hooked
from ...ops import rotate_pairs
from ..key_masks import causal_key_mask_of, for_each
from ..packs_together import PacksTogether, is_shrunk
from .heads import DecoderLayout
from .step import Step, make_step, takes


class CompactCausalAttention(PacksTogether):
    """Grouped-query attention on the kept channels: to be mixed into transformers' attention of a family.

    With "sdpa" attention (the default), on the CPU and where nothing wants a gradient, q, k and v are one product and
    heads are never padded. Everything else (see `CompactSelfAttention`) takes transformers' attention on heads padded
    to the widest one.

    `forward` returns the kept channels of every query head side by side; the block adds o's product to the residual.
    The cache holds keys [batch, 1, tokens, kept key channels] and values [batch, 1, tokens, kept value channels], heads
    side by side: it is as much smaller as k and v are. Any cache of transformers takes them.
    """

    names = ("q_proj", "k_proj", "v_proj")
    eager: Callable  # transformers' own attention for "eager"
    norms_heads = False  # whether `normed` does anything

    def make_compact(self, linears, layout: DecoderLayout) -> None:
        """Take q, k, v and o of a block, in place of the dense ones."""
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linears
        self.layout = layout
        self.ragged = CompactAttention(
            layout.key_first, layout.value_first, self.scaling, layout.shared_by, causal=True
        )
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
            is_plain, key_mask = causal_key_mask_of(attention_mask)
            if is_plain:
                key_mask = for_each(key_mask, len(hidden_states))
                return self._attend_ragged(hidden_states, position_embeddings, key_mask, past_key_values), None
        return self._attend_padded(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    def _attend_ragged(self, x: Tensor, position_embeddings, key_mask: Tensor | None, past) -> Tensor:
        at, ragged = self.layout, self.ragged
        query, key, value = ragged.project(x, self._layers(), fuses=True)
        query, key = self.normed(query, key)
        cos, sin = position_embeddings
        query = rotate_pairs(query, cos, sin, at.angle, at.key_first, at.shared_by)
        key = rotate_pairs(key, cos, sin, at.angle, at.key_first)
        key, value = self._cached(key, value, past)
        if key_mask is None and x.shape[1] > 1:
            # No mask for several tokens says that they are the first ones; a static cache holds empty slots after them.
            key, value = key[:, : x.shape[1]], value[:, : x.shape[1]]
        return ragged.attend(query, key, value, key_mask)

    def _attend_padded(self, x: Tensor, position_embeddings, mask, past, **kwargs) -> tuple[Tensor, Tensor | None]:
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
            flat = (_side_by_side(t, index) for t, index in ((key, key_at), (value, value_at)))
            key, value = self._cached(*flat, past)
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
    """A block whose projections write into the residual directly: to be mixed into transformers' decoder layer.

    A few tokens after a cache are one C++ call (`decoder_step`) where the block is an ordinary one.
    """

    _step: Step | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values=None,
        **kwargs,
    ) -> Tensor:
        if takes(hidden_states, attention_mask, past_key_values):
            step = self._step
            if step is None or not step.is_fresh():
                step = self._step = make_step(self)
            y = None if step is None else step(hidden_states, position_embeddings, past_key_values)
            if y is not None:
                return y
        attention, mlp = self.self_attn, self.mlp
        kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        context, _ = attention(self.input_layernorm(hidden_states), past_key_values=past_key_values, **kwargs)
        hidden_states = attention.o_proj(context, residual=hidden_states)
        x = self.post_attention_layernorm(hidden_states)
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        if is_hooked(mlp, gate, up, down) or is_shrunk(gate, up, down):
            return hidden_states + mlp(x)
        return mlp_call(up, down, x, hidden_states, self.activation, gate)

    def __getstate__(self):
        return {**self.__dict__, "_step": None}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel j with channel j + width / 2 turned by one angle. x: [..., width]; cos, sin broadcast to it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _side_by_side(x: Tensor, index: Tensor | None) -> Tensor:
    """[batch, tokens, kv, width] -> [batch, tokens, kept]."""
    x = x.flatten(2)
    return x if index is None else pick_channels(x, index)
