"""LLaMA and its relatives: self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj of every decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .. import types_in
from ..family import Kept, StockConfig
from ..linears import Make, activation_name
from ..table import Table
from .attention import CompactCausalAttention
from .blocks import CompactDecoderLayer
from .heads import compact_decoder_attention, compact_decoder_ffn
from .models import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from .norms import make_norms_fast
from .table import DecoderBlock, DecoderHeads, decoder_table, heads_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL_TYPES = types_in("decoders.llama")


class CompactLlamaAttention(CompactCausalAttention, modeling_llama.LlamaAttention):
    eager = staticmethod(modeling_llama.eager_attention_forward)


class CompactLlamaDecoderLayer(CompactDecoderLayer, modeling_llama.LlamaDecoderLayer):
    pass


class CompactMistralAttention(CompactCausalAttention, modeling_mistral.MistralAttention):
    eager = staticmethod(modeling_mistral.eager_attention_forward)

    def window(self) -> int | None:
        window: int | None = getattr(self.config, "sliding_window", None)
        return window


class CompactMistralDecoderLayer(CompactDecoderLayer, modeling_mistral.MistralDecoderLayer):
    pass


class CompactQwen2Attention(CompactCausalAttention, modeling_qwen2.Qwen2Attention):
    sliding_window: int | None
    eager = staticmethod(modeling_qwen2.eager_attention_forward)

    def window(self) -> int | None:
        return self.sliding_window


class CompactQwen2DecoderLayer(CompactDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    pass


class CompactQwen3Attention(CompactCausalAttention, modeling_qwen3.Qwen3Attention):
    """Norms over each query and key head read all their channels, so that none of these is pruned."""

    eager = staticmethod(modeling_qwen3.eager_attention_forward)
    norms_heads = True
    head_dim: int
    q_norm: nn.Module
    k_norm: nn.Module
    sliding_window: int | None

    def normed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        query, key = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key))
        return self.q_norm(query).flatten(-2), self.k_norm(key).flatten(-2)

    def window(self) -> int | None:
        return self.sliding_window


class CompactQwen3DecoderLayer(CompactDecoderLayer, modeling_qwen3.Qwen3DecoderLayer):
    pass


@dataclass(frozen=True)
class _Parts:
    layer: type
    attention: type
    compact_layer: type


_PARTS = (
    _Parts(modeling_llama.LlamaDecoderLayer, CompactLlamaAttention, CompactLlamaDecoderLayer),
    _Parts(modeling_mistral.MistralDecoderLayer, CompactMistralAttention, CompactMistralDecoderLayer),
    _Parts(modeling_qwen2.Qwen2DecoderLayer, CompactQwen2Attention, CompactQwen2DecoderLayer),
    _Parts(modeling_qwen3.Qwen3DecoderLayer, CompactQwen3Attention, CompactQwen3DecoderLayer),
)


_MODELS: dict[type, type] = {cls.__bases__[-1]: cls for cls in (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)}


def blocks(model: PreTrainedModel) -> list[tuple[nn.Module, DecoderBlock]]:
    """Every decoder layer, and the module names of its linears."""
    return [(module, block) for module, block, _ in _found(model)]


def _found(model: PreTrainedModel) -> list[tuple[modeling_llama.LlamaDecoderLayer, DecoderBlock, _Parts]]:
    found = []
    for name, module in model.named_modules():
        parts = next((parts for parts in _PARTS if isinstance(module, parts.layer)), None)
        if parts is not None:
            a, f = f"{name}.self_attn.", f"{name}.mlp."
            attention = (a + "q_proj", a + "k_proj", a + "v_proj", a + "o_proj")
            block = DecoderBlock(*attention, f + "gate_proj", f + "up_proj", f + "down_proj")
            found.append((module, block, parts))
    return found


def _heads(model: PreTrainedModel) -> DecoderHeads:
    return heads_of(model, prunes_pairs=model.config.model_type != "qwen3")


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for an activation that is not zero at zero and for unknown rotary pairs."""
    activation_name(model.config.hidden_act)
    return decoder_table(model, [b for _, b in blocks(model)], _heads(model))


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    heads, activation = _heads(model), activation_name(model.config.hidden_act)
    for module in model.modules():
        if (
            module is not model and type(module) in _MODELS
        ):  # a base model alone stays what it was, and calls its blocks
            module.__class__ = _MODELS[type(module)]
    for module, block, parts in _found(model):
        attention, mlp = module.self_attn, module.mlp
        linears, layout = compact_decoder_attention(make, plan, block, heads)
        attention.__class__ = parts.attention
        attention.make_compact(linears, layout)
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = compact_decoder_ffn(make, plan, block)
        module.activation, module.classes = activation, (type(mlp), type(mlp.act_fn))
        module.__class__ = parts.compact_layer
    make_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """`head_dim` is a number of its own: whole key/value heads may go, with the query heads that read them. (Qwen2's
    config has no such field, but keeps and honours one; LLaMA's wants the query heads to divide hidden_size.)
    """
    heads, kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    divides = config.model_type == "llama"
    counts = (n for n in range(1, kv) if not divides or config.hidden_size % (n * heads // kv) == 0)
    return StockConfig(heads, kv, True, (*counts, kv))


def most_tokens(config: PretrainedConfig) -> int:
    """As `Family.most_tokens`."""
    positions: int = config.max_position_embeddings
    return positions
