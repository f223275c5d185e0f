"""BERT and RoBERTa, whose blocks differ in name only: attention.{self,output}, intermediate, output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

from ...nn import CompactLinear
from ..family import Kept, StockConfig
from ..linears import Activation, Make, activation_name
from ..table import Table
from .blocks import CompactSelfAttention, RunsAtOnce, add_residual, run_activated, run_ffn
from .heads import compact_encoder_attention, compact_encoder_ffn
from .norms import make_layer_norms_fast
from .step import Parts
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _CompactAttention(CompactSelfAttention):
    names = ("query", "key", "value")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: object = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            raise ValueError(
                f"past_key_values must be None (got {type(past_key_values).__name__}): a compact encoder reads no keys "
                "and values but its own, so that prefixes (PEFT's prefix tuning) cannot stand before them"
            )
        return self.attend(hidden_states, attention_mask, **kwargs)


class _CompactResidual(nn.Module):
    """The product of `dense` added to the residual, then LayerNorm: BertSelfOutput and BertOutput alike."""

    dense: CompactLinear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(add_residual(self.dense, self.dropout, hidden_states, input_tensor))
        return y


class _CompactIntermediate(nn.Module):
    """The first FFN layer, activation fused."""

    dense: CompactLinear
    intermediate_act_fn: Activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        return run_activated(self.dense, self.intermediate_act_fn, hidden_states)


class _CompactLayer(RunsAtOnce):
    """All in one call, or both FFN layers, unless someone listens to the modules around them."""

    attention: Any  # transformers' own, around the self-attention and its output
    intermediate: _CompactIntermediate
    output: _CompactResidual
    chunk_size_feed_forward: int
    containers: tuple[type]  # the class of `attention`

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None and past_key_values is None and not self.chunk_size_feed_forward:
            whole = self.at_once(hidden_states, attention_mask)
            if whole is not None:
                return whole
        rest = (encoder_hidden_states, encoder_attention_mask, past_key_values)
        y: Tensor = super().forward(hidden_states, attention_mask, *rest, **kwargs)
        return y

    def parts(self) -> Parts | None:
        """See `RunsAtOnce`."""
        around: Any = self.attention
        first, second = self.intermediate, self.output
        if (type(around),) != self.containers:
            return None
        attention, output = around.self, around.output
        if type(attention).forward is not _CompactAttention.forward:
            return None
        own = (_CompactResidual.forward, _CompactIntermediate.forward, _CompactResidual.forward)
        if tuple(type(module).forward for module in (output, first, second)) != own:
            return None
        dropouts = (attention.dropout, output.dropout, second.dropout)
        return Parts(attention, output.dense, output.LayerNorm, first.dense, first.intermediate_act_fn, second.dense,
                     second.LayerNorm, dropouts, (around, output, first, second))  # fmt: skip

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        first, output, out = self.intermediate, self.output, None
        if type(first).forward is _CompactIntermediate.forward and type(output).forward is _CompactResidual.forward:
            parts = (first.dense, first.intermediate_act_fn, output.dense, output.dropout)
            out = run_ffn((first, output), *parts, attention_output)
        y: Tensor
        if out is None:
            y = super().feed_forward_chunk(attention_output)  # type: ignore[misc]  # of the layer this is mixed into
        else:
            y = output.LayerNorm(out)
        return y


class CompactBertSelfAttention(_CompactAttention, modeling_bert.BertSelfAttention):
    eager = staticmethod(modeling_bert.eager_attention_forward)


class CompactBertSelfOutput(_CompactResidual, modeling_bert.BertSelfOutput):
    pass


class CompactBertIntermediate(_CompactIntermediate, modeling_bert.BertIntermediate):
    pass


class CompactBertOutput(_CompactResidual, modeling_bert.BertOutput):
    pass


class CompactBertLayer(_CompactLayer, modeling_bert.BertLayer):
    containers = (modeling_bert.BertAttention,)


class CompactRobertaSelfAttention(_CompactAttention, modeling_roberta.RobertaSelfAttention):
    eager = staticmethod(modeling_roberta.eager_attention_forward)


class CompactRobertaSelfOutput(_CompactResidual, modeling_roberta.RobertaSelfOutput):
    pass


class CompactRobertaIntermediate(_CompactIntermediate, modeling_roberta.RobertaIntermediate):
    pass


class CompactRobertaOutput(_CompactResidual, modeling_roberta.RobertaOutput):
    pass


class CompactRobertaLayer(_CompactLayer, modeling_roberta.RobertaLayer):
    containers = (modeling_roberta.RobertaAttention,)


@dataclass(frozen=True)
class _Parts:
    layer: type
    attention: type
    self_output: type
    intermediate: type
    output: type
    compact_layer: type


_PARTS = (
    _Parts(
        modeling_bert.BertLayer,
        CompactBertSelfAttention,
        CompactBertSelfOutput,
        CompactBertIntermediate,
        CompactBertOutput,
        CompactBertLayer,
    ),
    _Parts(
        modeling_roberta.RobertaLayer,
        CompactRobertaSelfAttention,
        CompactRobertaSelfOutput,
        CompactRobertaIntermediate,
        CompactRobertaOutput,
        CompactRobertaLayer,
    ),
)


def blocks(model: PreTrainedModel) -> list[tuple[nn.Module, EncoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    return [(module, block) for module, block, _ in _found(model)]


def _found(model: PreTrainedModel) -> list[tuple[modeling_bert.BertLayer, EncoderBlock, _Parts]]:
    found = []
    for name, module in model.named_modules():
        parts = next((parts for parts in _PARTS if isinstance(module, parts.layer)), None)
        if parts is not None:
            a = f"{name}.attention."
            attention = (a + "self.query", a + "self.key", a + "self.value", a + "output.dense")
            block = EncoderBlock(*attention, f"{name}.intermediate.dense", f"{name}.output.dense")
            found.append((module, block, parts))
    return found


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for a model used as a decoder, and for an activation that is not zero at zero."""
    if model.config.is_decoder or model.config.add_cross_attention:
        raise ValueError(
            f"{type(model).__name__}: is_decoder and add_cross_attention must be False; prunekern prunes "
            f"{model.config.model_type} as an encoder only"
        )
    activation_name(model.config.hidden_act)
    return encoder_table(model, [b for _, b in blocks(model)], model.config.num_attention_heads)


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    activation = activation_name(model.config.hidden_act)
    for module, block, parts in _found(model):
        attention = module.attention.self
        linears, layout = compact_encoder_attention(make, plan, block, head_dim)
        attention.__class__ = parts.attention
        attention.make_compact(linears[:3], layout)
        module.attention.output.dense = linears[3]
        module.attention.output.__class__ = parts.self_output
        module.intermediate.dense, module.output.dense = compact_encoder_ffn(make, plan, block)
        module.intermediate.intermediate_act_fn = Activation(activation)
        module.intermediate.__class__ = parts.intermediate
        module.output.__class__ = parts.output
        module.__class__ = parts.compact_layer
    make_layer_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))


def most_tokens(config: PretrainedConfig) -> int:
    """Positions of RoBERTa begin after that of padding."""
    positions: int = config.max_position_embeddings
    is_roberta: bool = config.model_type == "roberta"
    return positions - 2 * is_roberta
