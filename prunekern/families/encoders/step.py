"""Compact encoder blocks as one C++ call: attention, FFN, both residuals and both layer norms of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from ..key_masks import for_each, key_mask_of
from ..linears import Activation
from ..made_from import MadeFrom, parts_of
from .norms import CompactLayerNorm

# csrc/python/encoder_block.cpp
_RUN: Callable[..., Tensor | None] | None = _native.core().call_encoder_blocks if calls.EAGER else None
_f32 = torch.float32
# Where sequences that stand one after the other begin, and the last one ends: ascending from 0.
Starts = tuple[int, ...]
# Of rows, batch x tokens. The core keeps the memory of what is between the parts, 15 KB a row of BERT-base's shape
# (2,304 + 768 + 768 floats), and the more rows there are, the less Python's questions weigh.
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Parts:
    """The modules of a block, whatever their family calls them. around: those that only hold others, and have the
    forward that the family gave them.
    """

    # Any: of the classes that the family made, unless somebody put others there; attention is CompactSelfAttention.
    attention: Any
    o: Any
    norm: Any
    up: Any
    act: Any
    down: Any
    mlp_norm: Any
    dropouts: tuple[Any, ...]
    around: tuple[nn.Module, ...] = ()
    bias_heads: tuple[int, ...] | None = None  # of a bias of the logits: which of its heads each that is left reads

    @property
    def linears(self) -> tuple[Any, ...]:
        """All of them."""
        return (*self.attention._layers(), self.o, self.up, self.down)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that a call of the block does not call."""
        rest = (self.norm, self.act, self.mlp_norm, *self.dropouts, *self.around)
        return (self.attention, *self.linears, *rest)


class Step:
    """The arguments of one block, and what they were made of; see `make_step`."""

    __slots__ = ("layer", "made", "parameters")

    def __init__(self, block: nn.Module, parts: Parts):
        attention, up, down = parts.attention, parts.up, parts.down
        layers = attention._layers()
        qkv = attention.ragged.packed_for(layers[0].weight, layers, True)
        o, first, last = (layer.packed() for layer in (parts.o, up, down))
        if qkv is None or o is None or first is None or last is None:
            raise _NotPacked
        ragged = attention.ragged
        self.layer = (
            *parts_of(qkv), *parts_of(o), parts.o.out_index, ragged.qk_first, ragged.v_first, parts.bias_heads,
            ragged.scale, ARITHMETIC[arithmetic_of(layers)], *_norm(parts.norm), *parts_of(first), *parts_of(last),
            down.out_index, up.out_features, NUMBER[parts.act.name], *_norm(parts.mlp_norm),
        )  # fmt: skip
        made = self.made = MadeFrom(block, parts.modules, (qkv, o, first, last))
        for norm in (parts.norm, parts.mlp_norm):
            made.also(norm._parameters, "weight", "bias")
            made.also(norm.__dict__, "eps", "normalized_shape")
        for dropout in parts.dropouts:
            made.also(dropout.__dict__, "training", "p")
        for linear in (parts.o, down):
            made.also(linear._buffers, "out_index")
        made.also(parts.act.__dict__, "name")
        made.also(attention.__dict__, "training", "scaling", "heads")
        made.also(attention.config.__dict__, "_attn_implementation_internal")
        weights = (parameter for module in parts.modules for parameter in module._parameters.values())
        self.parameters = tuple(p for p in weights if p is not None)

    def is_fresh(self) -> bool:
        """Whether the block still is what the arguments were made of, and nobody listens to its modules."""
        return self.made.is_fresh()

    def __call__(self, x: Tensor, mask: Tensor | Starts | None, bias: Tensor | None = None) -> Tensor | None:
        """The block's output; None where the call is not ordinary. bias: of the logits, [1, heads, tokens, tokens], for
        parts with `bias_heads`. mask: where x [1, rows, hidden] holds sequences one after the other, their beginnings.
        """
        return run_blocks(x, mask, bias, (self.layer,), self.parameters)


def run_blocks(
    x: Tensor, mask: Tensor | Starts | None, bias: Tensor | None, layers: tuple[Any, ...], parameters: Iterable[Tensor]
) -> Tensor | None:
    """x through blocks, one after the other; None where the call is not ordinary. Arguments as of a `Step`, of which
    layers and parameters are.
    """
    if _RUN is None or calls.needs_grad(x, bias, *parameters):
        return None
    if isinstance(mask, tuple):
        return _RUN(x, mask, bias, calls.threads(), layers)
    forbids_keys_only, key_mask = key_mask_of(mask)
    if not forbids_keys_only:
        return None
    return _RUN(x, for_each(key_mask, len(x)), bias, calls.threads(), layers)


class _NotPacked(Exception):
    pass


def _norm(norm: Any) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def takes(x: Tensor, rows: int | None = None) -> bool:
    """Whether a call is one a `Step` may be made for: float32 on the CPU, nobody looks on. rows: how many of x
    [batch, tokens, hidden] blocks are given at once, where that is not all.
    """
    if _RUN is None or type(x) is not Tensor or x.dtype is not _f32 or x.device.type != "cpu" or x.dim() != 3:
        return False
    return (x.shape[0] * x.shape[1] if rows is None else rows) <= _MOST_ROWS and calls.short()


def make_step(block: nn.Module, parts: Parts) -> Step | None:
    """None where a block does not run on packed weights as a whole, or someone listens to a module of it."""
    if not _is_ordinary(parts):
        return None
    try:
        return Step(block, parts)
    except _NotPacked:
        return None


def _is_ordinary(parts: Parts) -> bool:
    attention, ragged = parts.attention, parts.attention.ragged
    if not attention._is_plain() or attention.padded[0] == 0 or ragged.scale != attention.scaling:
        return False
    if any(type(layer) is not CompactLinear for layer in parts.linears) or type(parts.act) is not Activation:
        return False
    if any(type(d) is not nn.Dropout or (d.training and d.p > 0) for d in parts.dropouts):
        return False
    if is_hooked(*parts.modules):
        return False
    return _are_whole(parts) and all(_is_norm(norm, parts) for norm in (parts.norm, parts.mlp_norm))


def _are_whole(parts: Parts) -> bool:
    """Whether the linears' weights are packed as the call wants them."""
    q, k, v, o, up, down = linears = parts.linears
    for layer in linears:
        if layer._buffers["in_index"] is not None or layer.activation != "none" or not is_packable(layer.weight):
            return False
    for alike in ((q, k, v), (up, down)):
        if len({(layer.weight.dtype, layer.activations) for layer in alike}) > 1:
            return False
    return up._buffers["out_index"] is None and down.kept_in == up.out_features


def _is_norm(norm: Any, parts: Parts) -> bool:
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    if type(norm) is not CompactLayerNorm or weight is None or bias is None:
        return False
    return norm.normalized_shape == (parts.o.out_features,) and weight.dtype is _f32 and bias.dtype is _f32
