"""DistilBERT: attention.{q,k,v,out}_lin and ffn.{lin1,lin2} of every TransformerBlock."""

from __future__ import annotations

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.distilbert import modeling_distilbert as hf

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

MODEL_TYPES = ("distilbert",)


class CompactDistilBertAttention(hf.DistilBertSelfAttention):
    """Attention on the kept channels. Returns what o reads; the block adds o's product to the residual."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, hf.eager_attention_forward)
        return padded_heads_attention(
            self, self.q_lin, self.k_lin, self.v_lin, self.layout, hidden_states, attention_mask, interface, **kwargs
        )


class CompactDistilBertBlock(hf.TransformerBlock):
    """A block whose projections write into the residual directly."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        context, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = self.sa_layer_norm(self.attention.out_lin(context, residual=hidden_states))
        inner = self.ffn.lin1(attended)  # activation fused
        return self.output_layer_norm(add_residual(self.ffn.lin2, self.ffn.dropout, inner, attended))


def blocks(model: nn.Module) -> list[tuple[nn.Module, Block]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, hf.TransformerBlock):
            a, f = f"{name}.attention.", f"{name}.ffn."
            names = (a + "q_lin", a + "k_lin", a + "v_lin", a + "out_lin", f + "lin1", f + "lin2")
            found.append((module, Block(*names)))
    return found


def table(model: nn.Module) -> Table:
    activation_name(model.config.activation)
    return encoder_table(model, [b for _, b in blocks(model)], model.config.n_heads)


def rebuild(model: nn.Module, plan, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    head_dim = model.config.dim // model.config.n_heads
    activation = activation_name(model.config.activation)
    for module, block in blocks(model):
        attention, ffn = module.attention, module.ffn
        linears, layout = compact_attention_linears(make, plan, block, head_dim)
        attention.q_lin, attention.k_lin, attention.v_lin, attention.out_lin = linears
        attention.layout = (layout.heads, layout.width)
        attention.__class__ = CompactDistilBertAttention
        ffn.lin1, ffn.lin2 = compact_ffn_linears(make, plan, block, activation)
        ffn.activation = nn.Identity()
        module.__class__ = CompactDistilBertBlock
