"""How the attention of compact encoder blocks with rotary positions runs: every query sees all keys, or near ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn import CompactAttention, pick_channels
from ...nn.compact_attention import Layers, arithmetic_of
from ...ops import rotate_pairs
from ..decoders.heads import DecoderLayout
from ..fused import SplitLinear
from ..key_masks import for_each, near_key_mask_of
from ..linears import Projections
from ..packs_together import PacksTogether

Turns = tuple[Tensor, Tensor]  # cos and sin, [batch or 1, tokens, head_dim]


class CompactRotaryAttention(PacksTogether):
    """Multi-head attention on the kept channels: to be mixed into transformers' attention, which it overrides.

    `attend` returns the kept value channels side by side. With "sdpa" attention (the default), on the CPU and where
    nothing wants a gradient, q, k and v are one product and heads are never padded. Everything else (see
    `CompactSelfAttention`) takes transformers' attention on heads padded to the widest one.
    """

    names = ("q", "k", "v")  # in Wqkv
    eager: Callable[..., tuple[Tensor, Tensor | None]]  # transformers' own attention for "eager"
    Wqkv: SplitLinear
    Wo: nn.Module
    out_drop: nn.Module
    attention_dropout: float
    head_dim: int
    sliding_window: int | None
    deterministic_flash_attn: bool

    def make_compact(self, linears: Projections, layout: DecoderLayout) -> None:
        """Take q, k, v and o of a block, in place of the dense ones."""
        for name, linear in zip(self.names, linears[:3], strict=True):
            setattr(self.Wqkv, name, linear)
        self.Wo = linears[3]
        self.layout = layout
        self.ragged = CompactAttention(layout.key_first, layout.value_first, self.scaling)
        self._turns: dict[torch.device, Tensor] = {}

    def forward(
        self, hidden_states: Tensor, position_embeddings: Turns, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> the same, and attention weights or None."""
        context, weights = self.attend(hidden_states, position_embeddings, attention_mask, **kwargs)
        return self.out_drop(self.Wo(context)), weights

    def attend(self, x: Tensor, turns: Turns, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x: [batch, tokens, hidden] -> [batch, tokens, kept value channels], and attention weights or None."""
        if self.layout.kv == 0:  # no value channel is left in the layer: Wo adds its bias, if any, to the residual
            weights = None
            if self.config._attn_implementation == "eager":  # of no head, so that the other layers' keep their places
                weights = x.new_zeros(len(x), 0, x.shape[1], x.shape[1])
            return x.new_zeros(*x.shape[:-1], 0), weights
        layers = self._layers()
        if self._runs_ragged(x, layers):
            is_plain, key_mask, window = near_key_mask_of(mask, self.near())
            if is_plain:
                return self._attend_ragged(x, layers, turns, for_each(key_mask, len(x)), window), None
        return self._attend_padded(x, layers, turns, mask, **kwargs)

    def near(self) -> int | None:
        """How far from a query the keys are that it sees, by what masks are made of; None: it sees all of them."""
        window: int | None = None if self.sliding_window is None else getattr(self.config, "sliding_window", None)
        return window

    @property
    def scaling(self) -> float:  # type: ignore[override]  # transformers has it in no attribute
        """Of the logits: that of the dense head."""
        scale: float = self.head_dim**-0.5
        return scale

    def _attend_ragged(
        self, x: Tensor, layers: Layers, turns: Turns, key_mask: Tensor | None, window: int | None
    ) -> Tensor:
        at, ragged = self.layout, self.ragged
        query, key, value = ragged.project(x, layers, fuses=True)
        query, key = (rotate_pairs(t, *turns, at.angle, at.key_first) for t in (query, key))
        return ragged.attend(query, key, value, key_mask, arithmetic_of(layers), window=window)

    def _attend_padded(
        self, x: Tensor, layers: Layers, turns: Turns, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Padding is zero in q, k and v: it changes no logit, and its outputs are dropped."""
        heads, width = self.layout.kv, self.layout.width
        shape = (*x.shape[:-1], heads, width)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in layers)
        turn = self._turn_on(x.device)
        cos, sin = (c.index_select(-1, turn).view(*c.shape[:2], heads, width).transpose(1, 2) for c in turns)
        query, key = (_rotated(t, cos, sin) for t in (query, key))
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        out, weights = interface(
            self, query, key, value, mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, deterministic=self.deterministic_flash_attn,
            **kwargs,
        )  # fmt: skip
        out, kept = out.reshape(*x.shape[:-1], heads * width), getattr(layers[2], "out_index", self.layout.value)
        return out.contiguous() if kept is None else pick_channels(out, kept.to(out.device)), weights

    def _layers(self) -> Layers:
        q, k, v = self.names
        modules: dict[str, Any] = self._modules["Wqkv"]._modules
        return modules[q], modules[k], modules[v]

    def _dropout_rate(self) -> float:
        return self.attention_dropout

    def _turn_on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.layout.turn
        if device not in self._turns:
            self._turns[device] = self.layout.turn.to(device)
        return self._turns[device]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turns": {}}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel j with channel j + width / 2 turned by one angle, in float32 as transformers does. x: [..., width]."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
