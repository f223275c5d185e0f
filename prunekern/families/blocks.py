"""How compact encoder blocks run: attention on ragged heads or, where more than its result is wanted, on padded ones;
the FFN as one call.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn import CompactAttention, CompactLinear, mlp_call, pick_channels
from ..nn.hooked import is_hooked
from ..ops.packing import is_packable, version_of
from .encoder import HeadLayout

_bool = torch.bool


class PacksTogether:
    """Queries, keys and values as one product: to be mixed into an attention module that has them under `names`, and
    a `CompactAttention` under `ragged`.
    """

    names: tuple[str, str, str]  # of q, k and v in the module

    def pack(self) -> None:
        """Pack q, k and v as one where they will be used so."""
        layers = self.packs_together()
        if layers:
            self.ragged.pack_layers(layers)

    def packs_together(self) -> tuple[CompactLinear, ...]:
        """See `prunekern.nn.packed.pack_all`."""
        layers = self._layers()
        if is_shrunk(*layers):
            return ()
        weights = [layer.weight for layer in layers]
        alike = all(is_packable(w) and w.dtype is weights[0].dtype for w in weights)
        return layers if alike and self.ragged.v_first[-1] > 0 and self._is_plain() else ()

    def _layers(self) -> tuple[CompactLinear, CompactLinear, CompactLinear]:
        q, k, v = self.names
        modules = self._modules
        return modules[q], modules[k], modules[v]

    def _is_plain(self) -> bool:
        return self.config._attn_implementation == "sdpa" and not (self.training and self._dropout_rate() > 0)

    def _runs_ragged(self, x: Tensor, layers) -> bool:
        return self._is_plain() and not is_shrunk(*layers) and not is_hooked(*layers) and self.ragged.fuses(x, layers)


class CompactSelfAttention(PacksTogether):
    """Attention on the kept channels: to be mixed into transformers' self-attention of a family, which it overrides.

    `attend` returns the kept value channels side by side. With "sdpa" attention (the default), on the CPU and where
    nothing wants a gradient, q, k and v are one product and the heads are never padded. Gradients, dropout, other
    devices and dtypes, masks that forbid more than keys, and "eager" (whose attention weights may be asked for) take
    transformers' attention on heads padded to the widest one.
    """

    eager: Callable  # transformers' own attention for "eager"

    def make_compact(self, linears, layout: HeadLayout) -> None:
        """Take q, k and v of a block, in place of the dense ones."""
        for name, linear in zip(self.names, linears, strict=True):
            setattr(self, name, linear)
        self.padded = (layout.heads, layout.width)
        self.ragged = CompactAttention(layout.qk_first, layout.v_first, self.scaling)

    def attend(self, x: Tensor, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """x: [batch, tokens, hidden] -> [batch, tokens, kept value channels], and attention weights or None."""
        if self.padded[0] == 0:  # no value channel is left in the layer: o adds its bias to the residual
            weights = None
            if self.config._attn_implementation == "eager":  # of no head, so that the other layers' keep their places
                weights = x.new_zeros(len(x), 0, x.shape[1], x.shape[1])
            return x.new_zeros(*x.shape[:-1], 0), weights
        layers = self._layers()
        if self._runs_ragged(x, layers):
            forbids_keys_only, key_mask = key_mask_of(mask)
            if forbids_keys_only:
                return self.ragged(x, layers, for_each(key_mask, len(x)), fuses=True), None
        return self._attend_padded(x, layers, mask, **kwargs)

    def _dropout_rate(self) -> float:
        return self.dropout.p

    def _attend_padded(self, x: Tensor, layers, mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Padding is zero in q, k and v: it changes no logit, and its outputs are dropped. The softmax scale stays
        that of the dense head.
        """
        heads, width = self.padded
        shape = (*x.shape[:-1], heads, width)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in layers)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.dropout.p if self.training else 0.0
        out, weights = interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out, kept = out.reshape(*x.shape[:-1], heads * width), layers[2].out_index
        return out.contiguous() if kept is None else pick_channels(out, kept), weights


def key_mask_of(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether a mask of transformers forbids whole keys only and, if so, those allowed, bool [batch, keys] or None.

    transformers hands over None, or a bool [batch, 1, queries, keys] that repeats the padding of each sequence for
    every query. Only its values can tell it from another mask: they are compared once a forward pass (all blocks get
    the same tensor), which a graph of torch.compile cannot do.
    """
    if mask is None:
        return True, None
    if mask.dim() != 4 or mask.dtype is not _bool or mask.shape[1] != 1:
        return False, None
    if mask.shape[2] != 1 and mask.stride(2) != 0 and not _answer(_repeats_rows, mask):
        return False, None
    return True, mask[:, 0, 0]


def causal_key_mask_of(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether a mask of transformers forbids whole keys and what follows a query only, and the keys allowed.

    As `key_mask_of`; the queries are the last tokens: the last of them sees every key that is allowed at all.
    """
    if mask is None:
        return True, None
    if mask.dim() != 4 or mask.dtype is not _bool or mask.shape[1] != 1 or mask.shape[2] > mask.shape[3]:
        return False, None
    if mask.shape[2] != 1 and not _answer(_is_causal, mask):
        return False, None
    return True, mask[:, 0, -1]


def for_each(key_mask: Tensor | None, batch: int) -> Tensor | None:
    """[batch, keys] of a mask that may be one for all sequences, [1, keys]."""
    return key_mask if key_mask is None or len(key_mask) == batch else key_mask.expand(batch, -1)


class _Last(threading.local):
    """The mask asked about last by this thread: a reference that does not keep it, its version, question, answer."""

    mask: Callable = staticmethod(lambda: None)
    version = 0
    question: Callable | None = None
    answer = False


_last = _Last()


def _answer(question: Callable[[Tensor], bool], mask: Tensor) -> bool:
    """question(mask), asked once of a mask that all blocks get; no where a graph cannot ask."""
    if torch.compiler.is_compiling():
        return False
    version = version_of(mask)
    if _last.mask() is not mask or _last.version != version or version < 0 or _last.question is not question:
        _last.answer = question(mask)
        _last.mask, _last.version, _last.question = weakref.ref(mask), version, question
    return _last.answer


def _repeats_rows(mask: Tensor) -> bool:
    return torch.equal(mask, mask[:, :, :1].expand_as(mask))


def _is_causal(mask: Tensor) -> bool:
    queries, keys = mask.shape[2:]
    seen = torch.ones(queries, keys, dtype=_bool, device=mask.device).tril(keys - queries)
    return torch.equal(mask, mask[:, :, -1:] & seen)


def is_shrunk(*layers: nn.Module) -> bool:
    """Whether one of these layers is in training still: such layers are called each by itself."""
    return any(getattr(layer, "is_shrunk", False) for layer in layers)


def add_residual(linear: CompactLinear, dropout: nn.Dropout, x: Tensor, residual: Tensor) -> Tensor:
    """dropout(linear(x)) + residual; the add is fused into the product where dropout is off.

    The LayerNorm that follows is not: all of DistilBERT-base's take 0.40 of 53.9 ms at 1 x 128 and 3.6 of 428 ms at
    8 x 128 (25 % removed, fp32, one thread), so that removing them wholly would gain 0.8 %.
    """
    if dropout.training and dropout.p > 0:
        return dropout(linear(x)) + residual
    return linear(x, residual=residual)


def run_ffn(up: CompactLinear, down: CompactLinear, dropout: nn.Dropout, x: Tensor) -> Tensor:
    """x + dropout(down(up(x))), the activation being up's; one call where dropout is off."""
    if (dropout.training and dropout.p > 0) or is_hooked(up, down) or is_shrunk(up, down):
        return add_residual(down, dropout, up(x), x)
    return mlp_call(up, down, x, residual=x)
