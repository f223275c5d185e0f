"""LLaMA and its relatives: self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj of every decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from .decoder import Block, Heads, compact_attention_linears, compact_ffn_linears, decoder_table, heads_of
from .decoder_blocks import CompactCausalAttention, CompactDecoderLayer
from .linears import Make, activation_name
from .norms import make_norms_fast
from .table import Table

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class CompactLlamaAttention(CompactCausalAttention, modeling_llama.LlamaAttention):
    eager = staticmethod(modeling_llama.eager_attention_forward)


class CompactLlamaDecoderLayer(CompactDecoderLayer, modeling_llama.LlamaDecoderLayer):
    pass


class CompactMistralAttention(CompactCausalAttention, modeling_mistral.MistralAttention):
    eager = staticmethod(modeling_mistral.eager_attention_forward)

    def window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


class CompactMistralDecoderLayer(CompactDecoderLayer, modeling_mistral.MistralDecoderLayer):
    pass


class CompactQwen2Attention(CompactCausalAttention, modeling_qwen2.Qwen2Attention):
    eager = staticmethod(modeling_qwen2.eager_attention_forward)

    def window(self) -> int | None:
        return self.sliding_window


class CompactQwen2DecoderLayer(CompactDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    pass


class CompactQwen3Attention(CompactCausalAttention, modeling_qwen3.Qwen3Attention):
    """Norms over each query and key head read all their channels, so that none of these is pruned."""

    eager = staticmethod(modeling_qwen3.eager_attention_forward)
    norms_heads = True

    def normed(self, query, key):
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


def blocks(model: nn.Module) -> list[tuple[nn.Module, Block, _Parts]]:
    found = []
    for name, module in model.named_modules():
        for parts in _PARTS:
            if isinstance(module, parts.layer):
                a, f = f"{name}.self_attn.", f"{name}.mlp."
                attention = (a + "q_proj", a + "k_proj", a + "v_proj", a + "o_proj")
                found.append((module, Block(*attention, f + "gate_proj", f + "up_proj", f + "down_proj"), parts))
    return found


def _heads(model: nn.Module) -> Heads:
    return heads_of(model, prunes_pairs=model.config.model_type != "qwen3")


def table(model: nn.Module) -> Table:
    activation_name(model.config.hidden_act)
    return decoder_table(model, [b for _, b, _ in blocks(model)], _heads(model))


def rebuild(model: nn.Module, plan, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    heads, activation = _heads(model), activation_name(model.config.hidden_act)
    for module, block, parts in blocks(model):
        attention, mlp = module.self_attn, module.mlp
        linears, layout = compact_attention_linears(make, plan, block, heads)
        attention.__class__ = parts.attention
        attention.make_compact(linears, layout)
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = compact_ffn_linears(make, plan, block)
        module.activation = activation
        module.__class__ = parts.compact_layer
    make_norms_fast(model)
