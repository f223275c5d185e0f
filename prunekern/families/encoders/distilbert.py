"""DistilBERT: attention.{q,k,v,out}_lin and ffn.{lin1,lin2} of every TransformerBlock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.distilbert import modeling_distilbert as hf

from ..family import Kept, StockConfig
from ..linears import Make, activation_name
from ..table import Table
from .blocks import CompactSelfAttention, run_ffn
from .heads import compact_encoder_attention, compact_encoder_ffn
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL_TYPES: tuple[str, ...] = ("distilbert",)


class CompactDistilBertAttention(CompactSelfAttention, hf.DistilBertSelfAttention):
    """Returns what o reads; the block adds o's product to the residual."""

    names = ("q_lin", "k_lin", "v_lin")
    eager = staticmethod(hf.eager_attention_forward)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        return self.attend(hidden_states, attention_mask, **kwargs)


class CompactDistilBertBlock(hf.TransformerBlock):
    """A block whose projections write into the residual directly."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        context, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = self.sa_layer_norm(self.attention.out_lin(context, residual=hidden_states))
        y: Tensor = self.output_layer_norm(run_ffn(self.ffn.lin1, self.ffn.lin2, self.ffn.dropout, attended))
        return y


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
        ffn.lin1, ffn.lin2 = compact_encoder_ffn(make, plan, block, activation)
        ffn.activation = nn.Identity()
        module.__class__ = CompactDistilBertBlock


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is dim / n_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.n_heads, config.n_heads, False, (config.n_heads,), ffn_field="hidden_dim")


def most_tokens(config: PretrainedConfig) -> int:
    """As `Family.most_tokens`."""
    positions: int = config.max_position_embeddings
    return positions
