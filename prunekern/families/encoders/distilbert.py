"""DistilBERT: attention.{q,k,v,out}_lin and ffn.{lin1,lin2} of every TransformerBlock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.distilbert import modeling_distilbert as hf

from ...nn import CompactLinear
from ...nn.hooked import is_hooked, is_replaced
from .. import types_in
from ..family import Kept, StockConfig
from ..linears import Activation, Make, activation_name
from ..table import Table
from .blocks import CompactSelfAttention, RunsAtOnce, run_ffn
from .heads import compact_encoder_attention, compact_encoder_ffn
from .norms import make_layer_norms_fast
from .stack import RunsPlainStack
from .step import Parts
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL_TYPES = types_in("encoders.distilbert")


class CompactDistilBertAttention(CompactSelfAttention, hf.DistilBertSelfAttention):
    """The block adds o's product to the residual in one call, where nobody listens."""

    names = ("q_lin", "k_lin", "v_lin")
    out_lin: CompactLinear
    eager = staticmethod(hf.eager_attention_forward)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attend(hidden_states, attention_mask, **kwargs)
        return self.out_lin(context), weights


class CompactDistilBertBlock(RunsAtOnce, hf.TransformerBlock):
    """A block whose projections write into the residual directly."""

    attention: Any  # CompactDistilBertAttention and hf.FFN, unless somebody put others there
    ffn: Any
    sa_layer_norm: nn.Module
    output_layer_norm: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        whole = None if kwargs.get("is_causal") else self.at_once(hidden_states, attention_mask)
        if whole is not None:
            return whole
        attention, ffn = self.attention, self.ffn
        if type(attention) is not CompactDistilBertAttention or _listens(attention):
            attended = attention(hidden_states, attention_mask=attention_mask, **kwargs)[0] + hidden_states
        else:
            context, _ = attention.attend(hidden_states, attention_mask, **kwargs)
            attended = attention.out_lin(context, residual=hidden_states)
        attended = self.sa_layer_norm(attended)
        out = None
        if type(ffn) is hf.FFN:
            out = run_ffn((ffn,), ffn.lin1, ffn.activation, ffn.lin2, ffn.dropout, attended)
        y: Tensor = self.output_layer_norm(ffn(attended) + attended if out is None else out)
        return y

    def parts(self) -> Parts | None:
        """See `RunsAtOnce`."""
        attention, ffn, norms = self.attention, self.ffn, (self.sa_layer_norm, self.output_layer_norm)
        if type(attention) is not CompactDistilBertAttention or type(ffn) is not hf.FFN:
            return None
        return Parts(attention, attention.out_lin, norms[0], ffn.lin1, ffn.activation, ffn.lin2, norms[1],
                     (attention.dropout, ffn.dropout), (ffn,))  # fmt: skip


class CompactDistilBertTransformer(RunsPlainStack, hf.Transformer):
    """All blocks as one call."""

    block = CompactDistilBertBlock


def _listens(attention: CompactDistilBertAttention) -> bool:
    return is_hooked(attention, attention.out_lin) or is_replaced(attention.out_lin)


def blocks(model: PreTrainedModel) -> list[tuple[hf.TransformerBlock, EncoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, hf.TransformerBlock):
            a, f = f"{name}.attention.", f"{name}.ffn."
            names = (a + "q_lin", a + "k_lin", a + "v_lin", a + "out_lin", f + "lin1", f + "lin2")
            found.append((module, EncoderBlock(*names)))
    return found


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for an activation that is not zero at zero."""
    activation_name(model.config.activation)
    return encoder_table(model, [b for _, b in blocks(model)], model.config.n_heads)


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    head_dim = model.config.dim // model.config.n_heads
    activation = activation_name(model.config.activation)
    for module, block in blocks(model):
        attention, ffn = module.attention, module.ffn
        linears, layout = compact_encoder_attention(make, plan, block, head_dim)
        attention.__class__ = CompactDistilBertAttention
        attention.make_compact(linears[:3], layout)
        attention.out_lin = linears[3]
        ffn.lin1, ffn.lin2 = compact_encoder_ffn(make, plan, block)
        ffn.activation = Activation(activation)
        module.__class__ = CompactDistilBertBlock
    for encoder in [module for module in model.modules() if type(module) is hf.Transformer]:
        encoder.__class__ = CompactDistilBertTransformer
    make_layer_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is dim / n_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.n_heads, config.n_heads, False, (config.n_heads,), ffn_field="hidden_dim")


def most_tokens(config: PretrainedConfig) -> int:
    """As `Family.most_tokens`."""
    positions: int = config.max_position_embeddings
    return positions
