"""CLIP, SigLIP and SigLIP 2: text and vision towers, alone or both, of self_attn.{q,k,v,out}_proj and mlp.{fc1,fc2}.

What pools SigLIP's images (an attention and an MLP of its own) stays as it is. Towers may differ in width and heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from ..family import Kept, StockConfig
from ..linears import Make
from ..table import Table
from .prenorm import PreNormAttention, PreNormClasses, PreNormLayer, found_blocks, prenorm_table, rebuild_prenorm
from .table import EncoderBlock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Attention(PreNormAttention):
    output, dropout_rate = "out_proj", "dropout"
    scale: float

    @property
    def scaling(self) -> float:  # type: ignore[override]  # what others call it
        return self.scale


class CompactCLIPAttention(_Attention, modeling_clip.CLIPAttention):
    eager = staticmethod(modeling_clip.eager_attention_forward)


class _SiglipAttention(_Attention):
    def attend(self, x: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As CLIP's; transformers' own hands nothing else on."""
        return super().attend(x, mask)


class CompactSiglipAttention(_SiglipAttention, modeling_siglip.SiglipAttention):
    eager = staticmethod(modeling_siglip.eager_attention_forward)


class CompactSiglip2Attention(_SiglipAttention, modeling_siglip2.Siglip2Attention):
    eager = staticmethod(modeling_siglip2.eager_attention_forward)


class _Layer(PreNormLayer):
    parts = ("self_attn", "layer_norm1", "layer_norm2")


class CompactCLIPEncoderLayer(_Layer, modeling_clip.CLIPEncoderLayer):
    mlp_class = modeling_clip.CLIPMLP


class CompactSiglipEncoderLayer(_Layer, modeling_siglip.SiglipEncoderLayer):
    mlp_class = modeling_siglip.SiglipMLP


class CompactSiglip2EncoderLayer(_Layer, modeling_siglip2.Siglip2EncoderLayer):
    mlp_class = modeling_siglip2.Siglip2MLP


_CLASSES = (
    PreNormClasses(modeling_clip.CLIPEncoderLayer, CompactCLIPAttention, CompactCLIPEncoderLayer),
    PreNormClasses(modeling_siglip.SiglipEncoderLayer, CompactSiglipAttention, CompactSiglipEncoderLayer),
    PreNormClasses(modeling_siglip2.Siglip2EncoderLayer, CompactSiglip2Attention, CompactSiglip2EncoderLayer),
)


def blocks(model: PreTrainedModel) -> list[tuple[nn.Module, EncoderBlock]]:
    """Every layer of both towers, and the module names of its linears."""
    return [(found.module, found.block) for found in found_blocks(model, _CLASSES)]


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. A token of text and a patch count alike. ValueError for an activation that is not zero at
    zero.
    """
    return prenorm_table(model, found_blocks(model, _CLASSES))


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place. CLIP's text reads from left to right."""
    found = found_blocks(model, _CLASSES)
    texts = [m for m in model.modules() if isinstance(m, modeling_clip.CLIPTextModel)]
    causal = {id(layer) for text in texts for layer in text.encoder.layers}
    rebuild_prenorm(model, found, plan, make, {block.q: id(module) in causal for module, block, _ in found})


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said.

    ValueError for the config of two towers, whose widths are two numbers.
    """
    if hasattr(config, "text_config"):
        raise ValueError(
            f"rule 'stock' needs a config of one tower (got {config.model_type!r} with text_config and vision_config): "
            "prune the towers as models of their own, or with rule 'learned'"
        )
    return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))


def most_tokens(config: PretrainedConfig) -> int | None:
    """As `Family.most_tokens`, of text; an image has as many patches as it has."""
    positions: int | None = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    return positions
