"""A compact encoder block whose norms come before, with rotary positions and a gated FFN, as one C++ call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import _native
from ...nn import CompactLinear
from ...nn.compact_attention import arithmetic_of
from ...nn.hooked import is_hooked
from ...ops import calls
from ...ops.compact_attention import ARITHMETIC
from ...ops.compact_linear import NUMBER
from ...ops.packing import is_packable
from ..key_masks import for_each, near_key_mask_of
from ..linears import Activation
from ..made_from import MadeFrom, parts_of
from .norms import CompactLayerNorm

# csrc/python/prenorm_block.cpp
_RUN: Callable[..., Tensor | None] | None = _native.core().call_prenorm_block if calls.EAGER else None
_f32 = torch.float32


@dataclass(frozen=True)
class Parts:
    """The modules of a block, whatever their family calls them. around: those that only hold others, and have the
    forward that the family gave them. norm: nn.Identity where attention reads the residual as it is.
    """

    # Any: of the classes that the family made, unless somebody put others there; attention: CompactRotaryAttention.
    attention: Any
    o: Any
    norm: Any
    up: Any
    gate: Any
    act: Any
    down: Any
    mlp_norm: Any
    dropouts: tuple[Any, ...]
    around: tuple[nn.Module, ...] = ()

    @property
    def linears(self) -> tuple[Any, ...]:
        """All of them."""
        return (*self.attention._layers(), self.o, self.up, self.gate, self.down)

    @property
    def norms(self) -> tuple[Any, ...]:
        """Those there are."""
        return tuple(norm for norm in (self.norm, self.mlp_norm) if type(norm) is not nn.Identity)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that a call of the block does not call."""
        return (self.attention, *self.linears, self.norm, self.act, self.mlp_norm, *self.dropouts, *self.around)


class PrenormStep:
    """The arguments of one block, and what they were made of; see `make_prenorm_step`."""

    __slots__ = ("_attention", "_layer", "_made", "_parameters")

    def __init__(self, block: nn.Module, parts: Parts):
        attention, up, gate, down = parts.attention, parts.up, parts.gate, parts.down
        layers, ragged, at = attention._layers(), attention.ragged, attention.layout
        qkv = ragged.packed_for(layers[0].weight, layers, True)
        rest = [layer.packed() for layer in (parts.o, up, gate, down)]
        o, first, second, last = rest
        if qkv is None or o is None or first is None or second is None or last is None:
            raise _NotPacked
        self._attention = attention
        self._layer = (
            *_norm(parts.norm), *parts_of(qkv), at.angle, ragged.qk_first, ragged.v_first, ragged.scale,
            ARITHMETIC[arithmetic_of(layers)], *parts_of(o), parts.o.out_index, *_norm(parts.mlp_norm),
            *parts_of(first), *parts_of(second), *parts_of(last), down.out_index, up.out_features,
            NUMBER[parts.act.name],
        )  # fmt: skip
        made = self._made = MadeFrom(block, parts.modules, (qkv, o, first, second, last))
        for norm in parts.norms:
            made.also(norm._parameters, "weight", "bias")
            made.also(norm.__dict__, "eps", "normalized_shape")
        for dropout in parts.dropouts:
            if type(dropout) is nn.Dropout:
                made.also(dropout.__dict__, "training", "p")
        for linear in (parts.o, down):
            made.also(linear._buffers, "out_index")
        made.also(parts.act.__dict__, "name")
        made.also(attention.__dict__, "training", "head_dim")
        made.also(attention.config.__dict__, "_attn_implementation_internal")
        weights = (parameter for module in parts.modules for parameter in module._parameters.values())
        self._parameters = tuple(p for p in weights if p is not None)

    def is_fresh(self) -> bool:
        """Whether the block still is what the arguments were made of, and nobody listens to its modules."""
        return self._made.is_fresh()

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor | None:
        """The block's output; None where the call is not ordinary."""
        if _RUN is None or calls.needs_grad(x, *turns, *self._parameters):
            return None
        is_plain, key_mask, window = near_key_mask_of(mask, self._attention.near())
        if not is_plain:
            return None
        return _RUN(x, *turns, for_each(key_mask, len(x)), -1 if window is None else window, calls.threads(),
                    self._layer)  # fmt: skip


class _NotPacked(Exception):
    pass


def _norm(norm: Any) -> tuple[Tensor | None, Tensor | None, float]:
    return (None, None, 0.0) if type(norm) is nn.Identity else (norm.weight, norm.bias, norm.eps)


def make_prenorm_step(block: nn.Module, parts: Parts) -> PrenormStep | None:
    """None where a block does not run on packed weights as a whole, or someone listens to a module of it."""
    attention, at = parts.attention, parts.attention.layout
    if not attention._is_plain() or at.key_first[-1] == 0 or at.value_first[-1] == 0:
        return None
    if any(type(layer) is not CompactLinear for layer in parts.linears) or type(parts.act) is not Activation:
        return None
    if is_hooked(*parts.modules) or not all(_is_off(dropout) for dropout in parts.dropouts):
        return None
    if attention.ragged.scale != attention.scaling or not _are_whole(parts):
        return None
    if not all(_is_norm(norm, parts) for norm in parts.norms) or type(parts.mlp_norm) is nn.Identity:
        return None
    try:
        return PrenormStep(block, parts)
    except _NotPacked:
        return None


def _is_off(dropout: Any) -> bool:
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0))


def _are_whole(parts: Parts) -> bool:
    """Whether the linears' weights are packed as the call wants them."""
    q, k, v, o, up, gate, down = linears = parts.linears
    for layer in linears:
        if "weight" not in layer._parameters or layer._buffers["in_index"] is not None:
            return False
        if layer.activation != "none" or not is_packable(layer.weight):
            return False
    for alike in ((q, k, v), (up, gate, down)):
        if len({(layer.weight.dtype, layer.activations) for layer in alike}) > 1:
            return False
    if up._buffers["out_index"] is not None or gate._buffers["out_index"] is not None:
        return False
    return bool(down.kept_in == up.out_features == gate.out_features)


def _is_norm(norm: Any, parts: Parts) -> bool:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if type(norm) is not CompactLayerNorm or weight is None or weight.dtype is not _f32:
        return False
    return norm.normalized_shape == (parts.o.out_features,) and (bias is None or bias.dtype is _f32)
