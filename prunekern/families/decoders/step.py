"""A compact decoder block on a few tokens after a cache, as one C++ call: how a language model generates.

Between two layers, whose weights have just gone through the caches, every line of Python comes from memory: at one
token of SmolLM2-135M's shape (30 layers) what was asked and called there took 7 of 18 ms. So a layer's arguments are
made once, and one C call asks whether they still hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ... import _native
from ...nn import CompactLinear
from ...nn.hooked import is_hooked
from ...nn.packed import Packed
from ...ops import calls
from ...ops.compact_linear import NUMBER
from ...ops.packing import is_packable
from ..made_from import MadeFrom, parts_of
from .attention import CompactCausalAttention, Turns
from .cache_room import find_room, take
from .norms import FAST_NORMS, FastNorm

if TYPE_CHECKING:
    from transformers import Cache
    from transformers.models.llama.modeling_llama import LlamaMLP

# csrc/python/decoder_block.cpp
_RUN: Callable[..., Tensor | None] | None = _native.core().call_decoder_blocks if calls.EAGER else None
_FEW_ROWS = 8  # beyond, the products take so long that what is between them does not count
_f32 = torch.float32
_grad_enabled = torch.is_grad_enabled
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "gate_proj", "down_proj")


class HasMLP(Protocol):
    """The decoder layer as far as its MLP."""

    mlp: LlamaMLP  # or that of another family, of the same three layers
    classes: tuple[type, type]  # of mlp and its activation


class Block(HasMLP, Protocol):
    """The decoder layer that a step is made of."""

    self_attn: CompactCausalAttention
    mlp: LlamaMLP  # or that of another family, of the same three layers
    input_layernorm: FastNorm
    post_attention_layernorm: FastNorm
    activation: str
    _modules: dict[str, nn.Module | None]


class Step:
    """The arguments of one block and what they were made of; see `make_step`.

    layer: its part of the C++ call's arguments. made: what that was made from.
    """

    __slots__ = ("layer", "made", "_index")

    def __init__(self, block: Block, qkv: Packed, o: Packed, mlp: tuple[Packed, ...]):
        attention, ffn, norm, ffn_norm = _parts(block)
        at, (*_, o_proj), (up, _, down) = attention.layout, *_linears(attention, ffn)
        weights = [part for p in (qkv, o) for part in parts_of(p)]
        ffn_weights = [part for p in mlp for part in parts_of(p)]
        self._index = attention.layer_idx
        self.layer = (
            norm.weight, norm.variance_epsilon, *weights, o_proj.out_index, at.angle, at.key_first, at.value_first,
            at.shared_by, attention.scaling, ffn_norm.weight, ffn_norm.variance_epsilon, *ffn_weights,
            down.out_index, up.out_features, NUMBER[block.activation],
        )  # fmt: skip
        linears = [m for part in _linears(attention, ffn) for m in part]
        whole: Any = block
        made = self.made = MadeFrom(whole, (attention, ffn, norm, ffn_norm, ffn.act_fn, *linears), (qkv, o, *mlp))
        for m in (norm, ffn_norm):
            made.also(m._parameters, "weight")
            made.also(m.__dict__, "variance_epsilon")
        made.also(attention.config.__dict__, "_attn_implementation_internal")
        made.also(attention.__dict__, "training", "scaling", "is_causal")  # it has a dropout
        for linear in (o_proj, down):
            made.also(linear._buffers, "out_index")

    def is_fresh(self) -> bool:
        """Whether the block still is what the arguments were made of, and nobody listens to its modules."""
        return self.made.is_fresh()

    def __call__(self, x: Tensor, position_embeddings: Turns, past: Cache) -> Tensor | None:
        """The block's output, and the cache with the tokens of x; None where the call is not ordinary."""
        found = find_room(past, self._index, x.shape[1])
        if found is None:
            return None
        layer, room = found
        tokens = room.used + x.shape[1]
        keys, values = room.keys.narrow(2, 0, tokens), room.values.narrow(2, 0, tokens)
        y = run_blocks(x, *position_embeddings, (keys, values), calls.threads(), (self.layer,))
        if y is not None:
            take(layer, room, keys, values)
        return y


def run_blocks(
    x: Tensor, cos: Tensor, sin: Tensor, caches: tuple[Tensor, ...], threads: int, layers: tuple[Any, ...]
) -> Tensor | None:  # fmt: skip
    """x [batch, tokens, hidden] through blocks, of which `layers` are `Step.layer`; None where that cannot be.

    caches: keys and values of each, [batch, 1, past + tokens, channels], the last tokens of which are written.
    """
    return None if _RUN is None else _RUN(x, cos, sin, caches, threads, layers)


def takes(x: Tensor, mask: Tensor | None, past: Cache | None) -> bool:
    """Whether a call is one a `Step` may be made for: a few rows after a cache, no mask, no gradient, no tracer."""
    if _RUN is None or past is None or mask is not None or type(x) is not Tensor or x.dtype is not _f32:
        return False
    return x.dim() == 3 and x.shape[0] * x.shape[1] <= _FEW_ROWS and not _grad_enabled() and calls.short()


def make_step(block: Block) -> Step | None:
    """None where a block does not run on packed weights as a whole, or someone listens to a module of it."""
    attention, ffn, norm, ffn_norm = _parts(block)
    if type(attention).forward is not CompactCausalAttention.forward or not has_own_mlp(block):
        return None
    layout, (attends, ffns) = attention.layout, _linears(attention, ffn)
    linears = (*attends, *ffns)
    if not attention.is_causal or attention.norms_heads or not layout.key_first[-1] or not layout.value_first[-1]:
        return None
    if any(type(n) not in FAST_NORMS or n.weight.dtype is not _f32 for n in (norm, ffn_norm)):
        return None
    if (
        is_hooked(attention, ffn, norm, ffn_norm, ffn.act_fn, *linears)
        or attention.training
        or not attention._is_plain()
    ):
        return None
    for layer in linears:
        if type(layer) is not CompactLinear or not is_packable(layer.weight) or layer.in_index is not None:
            return None
        if layer.activation != "none":
            return None
    q, k, v, o = attends
    up, gate, down = ffns
    for alike in ((q, k, v), ffns):
        if len({(layer.weight.dtype, layer.activations) for layer in alike}) > 1:
            return None
    if up.out_index is not None or gate.out_index is not None or down.kept_in != up.out_features:
        return None
    together = attention.ragged.packed_for(norm.weight, (q, k, v), True)
    packed = [p for p in (layer.packed() for layer in (o, *ffns)) if p is not None]
    if together is None or len(packed) < 1 + len(ffns):
        return None
    return Step(block, together, packed[0], tuple(packed[1:]))


def has_own_mlp(block: HasMLP) -> bool:
    """Whether nobody put another module in the place of the MLP or of its activation, which are not called."""
    return (type(block.mlp), type(block.mlp.act_fn)) == block.classes


def _parts(block: Block) -> tuple[CompactCausalAttention, LlamaMLP, FastNorm, FastNorm]:
    return block.self_attn, block.mlp, block.input_layernorm, block.post_attention_layernorm


def _linears(
    attention: CompactCausalAttention, ffn: LlamaMLP
) -> tuple[tuple[CompactLinear, ...], tuple[CompactLinear, ...]]:
    """Of an ordinary block, as `make_step` makes sure."""
    return tuple(attention._modules[n] for n in _LINEARS[0]), tuple(ffn._modules[n] for n in _LINEARS[1])
