"""How compact decoder blocks run: attention, the gated FFN, and both as one call where a language model generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...nn import mlp_call
from ...nn.hooked import is_hooked, is_replaced
from .attention import CompactCausalAttention, Turns
from .norms import FastNorm
from .step import Step, has_own_mlp, make_step, takes

if TYPE_CHECKING:
    from transformers import Cache
    from transformers.models.llama.modeling_llama import LlamaMLP


class CompactDecoderLayer(nn.Module):
    """A block whose projections write into the residual directly: to be mixed into transformers' decoder layer.

    A few tokens after a cache are one C++ call (`step`) where the block is an ordinary one.
    """

    self_attn: CompactCausalAttention
    mlp: LlamaMLP  # or that of another family, of the same three layers
    input_layernorm: FastNorm
    post_attention_layernorm: FastNorm
    activation: str
    classes: tuple[type, type]  # of mlp and its activation, as they were made
    _step: Step | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Turns = None,  # type: ignore[assignment]  # transformers always gives them
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if kwargs.get("is_causal") is not False and takes(hidden_states, attention_mask, past_key_values):
            step = self._step
            if step is None or not step.is_fresh():
                step = self._step = make_step(self)
            y = None if step is None else step(hidden_states, position_embeddings, past_key_values)
            if y is not None:
                return y
        attention, mlp = self.self_attn, self.mlp
        kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
        x = self.input_layernorm(hidden_states)
        attended: Tensor
        if type(attention).forward is not CompactCausalAttention.forward or _listens(attention):
            attended = hidden_states + attention(x, past_key_values=past_key_values, **kwargs)[0]
        else:
            context, _ = attention.attend(x, past_key_values=past_key_values, **kwargs)
            attended = attention.o_proj(context, residual=hidden_states)
        x = self.post_attention_layernorm(attended)
        if has_own_mlp(self):
            gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            if not (is_hooked(mlp, gate, up, down, mlp.act_fn) or is_replaced(gate, up, down)):
                return mlp_call(up, down, x, attended, self.activation, gate)
        added: Tensor = mlp(x)
        return attended + added

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": None}


def _listens(attention: CompactCausalAttention) -> bool:
    return is_hooked(attention, attention.o_proj) or is_replaced(attention.o_proj)
