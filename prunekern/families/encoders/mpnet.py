"""MPNet: attention.attn.{q,k,v,o} and BERT's FFN; a bias by relative position meets the logits of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mpnet import modeling_mpnet as hf

from ...nn import CompactLinear
from ...nn.compact_attention import Layers
from ...nn.hooked import is_hooked
from ..family import Kept, StockConfig
from ..linears import Make, activation_name
from ..table import Table
from .bert_like import Intermediate, Residual, feed_forward, make_ffn_compact
from .blocks import CompactSelfAttention, add_residual
from .heads import compact_encoder_attention
from .norms import make_layer_norms_fast
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class CompactMPNetSelfAttention(CompactSelfAttention, hf.MPNetSelfAttention):
    """Heads padded to the widest one, in PyTorch's own attention: the kernels' takes no bias."""

    names = ("q", "k", "v")
    o: CompactLinear
    heads: Tensor | None  # int64: those of the dense layer that are left; None: all

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        options: dict[str, Any] = {"position_bias": position_bias, "output_attentions": output_attentions}
        context, weights = self.attend(hidden_states, attention_mask, **options)
        return (self.o(context), weights) if output_attentions else (self.o(context),)

    def _attend_padded(
        self,
        x: Tensor,
        layers: Layers,
        mask: Tensor | None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """mask: added to the logits, [batch, 1, tokens, tokens]. position_bias: likewise, [1, dense heads, ...]."""
        query, key, value = self._padded_heads(x, layers)
        added = mask if mask is None else mask.to(x.dtype)
        if position_bias is not None:
            bias = position_bias if self.heads is None else position_bias[:, self.heads.to(x.device)]
            added = bias if added is None else bias + added
        if not output_attentions:
            dropout = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(query, key, value, added, dropout, scale=self.scaling)
            return self._kept_values(out.transpose(1, 2), layers), None
        logits = self.scaling * query @ key.transpose(2, 3)
        weights = self.dropout((logits if added is None else logits + added).softmax(-1))
        return self._kept_values((weights @ value).transpose(1, 2), layers), weights


class CompactMPNetAttention(hf.MPNetAttention):
    """Adds o's product to the residual in one call, where nobody listens."""

    attn: Any  # CompactMPNetSelfAttention, unless somebody put another there
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        attn, options = self.attn, {"position_bias": position_bias, "output_attentions": output_attentions}
        if type(attn) is not CompactMPNetSelfAttention or is_hooked(attn):
            outputs: tuple[Tensor | None, ...] = super().forward(hidden_states, attention_mask, **options)
            return outputs
        context, weights = attn.attend(hidden_states, attention_mask, **options)
        y = self.LayerNorm(add_residual(attn.o, self.dropout, context, hidden_states))
        return (y, weights) if output_attentions else (y,)


class CompactMPNetIntermediate(Intermediate, hf.MPNetIntermediate):
    pass


class CompactMPNetOutput(Residual, hf.MPNetOutput):
    pass


class CompactMPNetLayer(hf.MPNetLayer):
    """Both FFN layers are one call, unless someone listens to the modules around them."""

    attention: nn.Module
    intermediate: nn.Module
    output: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        options = {"position_bias": position_bias, "output_attentions": output_attentions}
        attended, *weights = self.attention(hidden_states, attention_mask, **options)
        y = feed_forward(self.intermediate, self.output, attended)
        return (self.output(self.intermediate(attended), attended) if y is None else y, *weights)


class CompactMPNetEncoder(hf.MPNetEncoder):
    """Makes the bias once for all sequences of a batch."""

    def compute_position_bias(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias: Tensor = super().compute_position_bias(x[:1], *args, **kwargs)  # [1, heads, tokens, tokens]
        return bias


def blocks(model: PreTrainedModel) -> list[tuple[hf.MPNetLayer, EncoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, hf.MPNetLayer):
            own = f"{name}.attention.attn."
            attention = (own + "q", own + "k", own + "v", own + "o")
            found.append((module, EncoderBlock(*attention, f"{name}.intermediate.dense", f"{name}.output.dense")))
    return found


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for an activation that is not zero at zero."""
    activation_name(model.config.hidden_act)
    return encoder_table(model, [b for _, b in blocks(model)], model.config.num_attention_heads)


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    dense_heads = model.config.num_attention_heads
    head_dim = model.config.hidden_size // dense_heads
    for module, block in blocks(model):
        attention, attn = module.attention, module.attention.attn
        linears, layout = compact_encoder_attention(make, plan, block, head_dim)
        attention.__class__, attn.__class__ = CompactMPNetAttention, CompactMPNetSelfAttention
        attn.config, attn.scaling = model.config, head_dim**-0.5
        attn.make_compact(linears[:3], layout)
        attn.o = linears[3]
        attn.heads = None if layout.heads == dense_heads else torch.unique(plan.layers[block.v].rows // head_dim)
        make_ffn_compact(module, block, plan, make, model.config)
        module.intermediate.__class__, module.output.__class__ = CompactMPNetIntermediate, CompactMPNetOutput
        module.__class__ = CompactMPNetLayer
    for module in model.modules():
        if type(module) is hf.MPNetEncoder:
            module.__class__ = CompactMPNetEncoder
    make_layer_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))


def most_tokens(config: PretrainedConfig) -> int:
    """Positions begin after that of padding, which is 1 whatever the config says."""
    positions: int = config.max_position_embeddings
    return positions - 2
