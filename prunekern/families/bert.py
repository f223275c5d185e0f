"""BERT and RoBERTa, whose blocks differ in name only: attention.{self,output}, intermediate, output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.models.roberta import modeling_roberta

from .encoder import (
    Block,
    Make,
    activation_name,
    add_residual,
    compact_attention_linears,
    compact_ffn_linears,
    encoder_table,
    padded_heads_attention,
)
from .table import Table

MODEL_TYPES = ("bert", "roberta")


class _CompactSelfAttention:
    """Attention on the kept channels."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        return padded_heads_attention(
            self, self.query, self.key, self.value, self.layout, hidden_states, attention_mask, interface, **kwargs
        )


class _CompactResidual:
    """The product of `dense` added to the residual, then LayerNorm: BertSelfOutput and BertOutput alike."""

    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(add_residual(self.dense, self.dropout, hidden_states, input_tensor))


class _CompactIntermediate:
    """The first FFN layer, activation fused."""

    def forward(self, hidden_states):
        return self.dense(hidden_states)


class CompactBertSelfAttention(_CompactSelfAttention, modeling_bert.BertSelfAttention):
    eager = staticmethod(modeling_bert.eager_attention_forward)


class CompactBertSelfOutput(_CompactResidual, modeling_bert.BertSelfOutput):
    pass


class CompactBertIntermediate(_CompactIntermediate, modeling_bert.BertIntermediate):
    pass


class CompactBertOutput(_CompactResidual, modeling_bert.BertOutput):
    pass


class CompactRobertaSelfAttention(_CompactSelfAttention, modeling_roberta.RobertaSelfAttention):
    eager = staticmethod(modeling_roberta.eager_attention_forward)


class CompactRobertaSelfOutput(_CompactResidual, modeling_roberta.RobertaSelfOutput):
    pass


class CompactRobertaIntermediate(_CompactIntermediate, modeling_roberta.RobertaIntermediate):
    pass


class CompactRobertaOutput(_CompactResidual, modeling_roberta.RobertaOutput):
    pass


@dataclass(frozen=True)
class _Parts:
    layer: type
    attention: type
    self_output: type
    intermediate: type
    output: type


_PARTS = (
    _Parts(
        modeling_bert.BertLayer,
        CompactBertSelfAttention,
        CompactBertSelfOutput,
        CompactBertIntermediate,
        CompactBertOutput,
    ),
    _Parts(
        modeling_roberta.RobertaLayer,
        CompactRobertaSelfAttention,
        CompactRobertaSelfOutput,
        CompactRobertaIntermediate,
        CompactRobertaOutput,
    ),
)


def blocks(model: nn.Module) -> list[tuple[nn.Module, Block, _Parts]]:
    found = []
    for name, module in model.named_modules():
        for parts in _PARTS:
            if isinstance(module, parts.layer):
                a = f"{name}.attention."
                attention = (a + "self.query", a + "self.key", a + "self.value", a + "output.dense")
                names = (*attention, f"{name}.intermediate.dense", f"{name}.output.dense")
                found.append((module, Block(*names), parts))
    return found


def table(model: nn.Module) -> Table:
    if model.config.is_decoder or model.config.add_cross_attention:
        raise ValueError(
            f"{type(model).__name__}: is_decoder and add_cross_attention must be False; prunekern prunes "
            f"{model.config.model_type} as an encoder only"
        )
    activation_name(model.config.hidden_act)
    return encoder_table(model, [b for _, b, _ in blocks(model)], model.config.num_attention_heads)


def rebuild(model: nn.Module, plan, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    activation = activation_name(model.config.hidden_act)
    for module, block, parts in blocks(model):
        attention = module.attention.self
        linears, layout = compact_attention_linears(make, plan, block, head_dim)
        attention.query, attention.key, attention.value, module.attention.output.dense = linears
        attention.layout = (layout.heads, layout.width)
        attention.__class__ = parts.attention
        module.attention.output.__class__ = parts.self_output
        module.intermediate.dense, module.output.dense = compact_ffn_linears(make, plan, block, activation)
        module.intermediate.intermediate_act_fn = nn.Identity()
        module.intermediate.__class__ = parts.intermediate
        module.output.__class__ = parts.output
