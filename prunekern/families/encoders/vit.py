"""ViT and DeiT: attention.{q,k,v,o}_proj and mlp.{fc1,fc2} of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from ..family import Kept, StockConfig
from ..linears import Make
from ..table import Table
from .prenorm import PreNormAttention, PreNormClasses, PreNormLayer, found_blocks, prenorm_table, rebuild_prenorm
from .table import EncoderBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Attention(PreNormAttention):
    output, dropout_rate = "o_proj", "attention_dropout"


class CompactViTAttention(_Attention, modeling_vit.ViTAttention):
    eager = staticmethod(modeling_vit.eager_attention_forward)


class CompactDeiTAttention(_Attention, modeling_deit.DeiTAttention):
    eager = staticmethod(modeling_deit.eager_attention_forward)


class _Layer(PreNormLayer):
    parts = ("attention", "layernorm_before", "layernorm_after")


class CompactViTLayer(_Layer, modeling_vit.ViTLayer):
    mlp_class = modeling_vit.ViTMLP


class CompactDeiTLayer(_Layer, modeling_deit.DeiTLayer):
    mlp_class = modeling_deit.DeiTMLP


_CLASSES = (
    PreNormClasses(modeling_vit.ViTLayer, CompactViTAttention, CompactViTLayer),
    PreNormClasses(modeling_deit.DeiTLayer, CompactDeiTAttention, CompactDeiTLayer),
)


def blocks(model: PreTrainedModel) -> list[tuple[nn.Module, EncoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    return [(found.module, found.block) for found in found_blocks(model, _CLASSES)]


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for an activation that is not zero at zero."""
    return prenorm_table(model, found_blocks(model, _CLASSES))


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    rebuild_prenorm(model, found_blocks(model, _CLASSES), plan, make)


def stock(config: PretrainedConfig) -> StockConfig:
    """The configs have no `head_dim`, but keep and honour one: whole heads may go."""
    heads = config.num_attention_heads
    return StockConfig(heads, heads, True, tuple(range(1, heads + 1)))


def most_tokens(config: PretrainedConfig) -> None:
    """As `Family.most_tokens`: an image has as many patches as it has."""
