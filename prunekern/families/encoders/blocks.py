"""How compact encoder blocks run: attention on ragged heads or, where more than its result is wanted, on padded ones;
the FFN as one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn import CompactAttention, CompactLinear, mlp_call, pick_channels
from ...nn.compact_attention import Layers
from ...nn.hooked import is_hooked, is_replaced
from ..key_masks import for_each, key_mask_of
from ..linears import Activation
from ..packs_together import PacksTogether
from .heads import EncoderLayout
from .step import Parts, Starts, Step, make_step, takes


class CompactSelfAttention(PacksTogether):
    """Attention on the kept channels: to be mixed into transformers' self-attention of a family, which it overrides.

    `attend` returns the kept value channels side by side. With "sdpa" attention (the default), on the CPU and where
    nothing wants a gradient, q, k and v are one product and the heads are never padded. Gradients, dropout, other
    devices and dtypes, masks that forbid more than keys, and "eager" (whose attention weights may be asked for) take
    transformers' attention on heads padded to the widest one.
    """

    eager: Callable[..., tuple[Tensor, Tensor | None]]  # transformers' own attention for "eager"
    dropout: nn.Dropout
    scaling: float

    def make_compact(self, linears: tuple[nn.Module, nn.Module, nn.Module], layout: EncoderLayout) -> None:
        """Take q, k and v of a block, in place of the dense ones."""
        for name, linear in zip(self.names, linears, strict=True):
            setattr(self, name, linear)
        self.padded, self.value_at = (layout.heads, layout.width), layout.value
        self.ragged = CompactAttention(layout.qk_first, layout.v_first, self.scaling)

    def attend(self, x: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x: [batch, tokens, hidden] -> [batch, tokens, kept value channels], and attention weights or None."""
        if self.padded[0] == 0:  # no value channel is left in the layer: o adds its bias to the residual
            weights = None
            if self.config._attn_implementation == "eager":  # of no head, so that the other layers' keep their places
                weights = x.new_zeros(len(x), 0, x.shape[1], x.shape[1])
            return x.new_zeros(*x.shape[:-1], 0), weights
        layers = self._layers()
        if self._runs_ragged(x, layers) and not kwargs.get("is_causal"):
            forbids_keys_only, key_mask = key_mask_of(mask)
            if forbids_keys_only:
                return self.ragged(x, layers, for_each(key_mask, len(x)), fuses=True), None
        return self._attend_padded(x, layers, mask, **kwargs)

    def _dropout_rate(self) -> float:
        return self.dropout.p

    def _attend_padded(
        self, x: Tensor, layers: Layers, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Padding is zero in q, k and v: it changes no logit, and its outputs are dropped. The softmax scale stays
        that of the dense head.
        """
        query, key, value = self._padded_heads(x, layers)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self.dropout.p if self.training else 0.0
        out, weights = interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self._kept_values(out, layers), weights

    def _padded_heads(self, x: Tensor, layers: Layers) -> list[Tensor]:
        """q, k and v of x, [batch, heads, tokens, width] each."""
        shape = (*x.shape[:-1], *self.padded)
        return [layer(x).view(shape).transpose(1, 2) for layer in layers]

    def _kept_values(self, out: Tensor, layers: Layers) -> Tensor:
        """[batch, tokens, heads, width] -> [batch, tokens, kept value channels]."""
        out, kept = out.flatten(2), getattr(layers[2], "out_index", self.value_at)
        return out.contiguous() if kept is None else pick_channels(out, kept.to(out.device))


class RunsAtOnce(nn.Module):
    """A block that is one C++ call where it is an ordinary one: to be mixed into transformers' block of a family."""

    _step: Step | None = None

    def parts(self) -> Parts | None:
        """The modules the call stands for; None where one of them is not the family's own."""
        raise NotImplementedError

    def at_once(self, x: Tensor, mask: Tensor | Starts | None, bias: Tensor | None = None) -> Tensor | None:
        """The block's output, x [batch, tokens, hidden] -> the same; None where its modules must be called. bias: as of
        a `Step`.
        """
        if not takes(x):
            return None
        step = self.fresh_step()
        return None if step is None else step(x, mask, bias)

    def fresh_step(self) -> Step | None:
        """The arguments of the call, of the block as it is now; None where its modules must be called."""
        step = self._step
        if step is None or not step.is_fresh():
            parts = self.parts()
            step = self._step = None if parts is None else make_step(self, parts)
        return step

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return {**self.__dict__, "_step": None}


def drops(dropout: nn.Module) -> bool:
    """Whether it does anything, or is another module in the place of transformers' own."""
    return type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)


def add_residual(linear: nn.Module, dropout: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """dropout(linear(x)) + residual; the add is fused into the product of a CompactLinear where dropout is off and
    nobody listens.
    """
    y: Tensor
    if drops(dropout) or is_hooked(linear, dropout) or is_replaced(linear):
        y = dropout(linear(x)) + residual
    else:
        y = linear(x, residual=residual)
    return y


def run_ffn(
    around: tuple[nn.Module, ...], up: CompactLinear, act: Activation, down: CompactLinear, dropout: nn.Module,
    x: Tensor,
) -> Tensor | None:  # fmt: skip
    """x + dropout(down(act(up(x)))) as one call; None where the modules must be called one by one, as they are where
    dropout is on, someone listens to one of them or of those `around` them, or put another in the place of one.
    """
    if type(act) is not Activation or drops(dropout) or is_replaced(up, down):
        return None
    if is_hooked(*around, up, act, down, dropout):
        return None
    return mlp_call(up, down, x, residual=x, activation=act.name)


def run_activated(linear: CompactLinear, act: Activation, x: Tensor) -> Tensor:
    """act(linear(x)), in one call where nobody listens."""
    if type(act) is not Activation or is_hooked(linear, act) or is_replaced(linear):
        y: Tensor = act(linear(x))
        return y
    return linear.run(x, None, act.name)
