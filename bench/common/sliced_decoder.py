"""The plainly sliced decoder: what a user gets who cuts the same channels out of a LLaMA without prunekern.

As bench/common/sliced.py for encoders: ordinary nn.Linear of kept rows and columns, SDPA on heads padded to the
layer's widest one, an ordinary cache of these heads, removed rows of o and down added where they belong (index_add).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common.sliced import Residual, cut


def sliced(dense: nn.Module, plan) -> nn.Module:
    """`dense` (LlamaForCausalLM, SiLU) with sliced blocks."""
    assert dense.config.model_type == "llama" and dense.config.hidden_act == "silu"
    layers = dense.model.layers
    small = copy.deepcopy(dense, {id(layer): layer for layer in layers})
    small.model.layers = nn.ModuleList(SlicedLayer(layer, f"model.layers.{i}.", plan) for i, layer in enumerate(layers))
    return small.eval().requires_grad_(False)


class SlicedLayer(nn.Module):
    """x = x + o(attention(norm(x))), then x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, layer: nn.Module, prefix: str, plan):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        d, shared = attention.head_dim, attention.num_key_value_groups
        self.index, self.scale, self.shared = attention.layer_idx, attention.scaling, shared

        def rows(name: str) -> Tensor:
            return plan.layers[prefix + name].rows

        k_rows, v_rows = rows("self_attn.k_proj"), rows("self_attn.v_proj")
        alive = torch.unique(v_rows // d).tolist()
        pairs = [[r % d for r in k_rows[k_rows // d == h].tolist() if r % d < d // 2] for h in alive]
        values = [[r % d for r in v_rows[v_rows // d == h].tolist()] for h in alive]
        half, self.v_width = max(map(len, pairs)), max(map(len, values))
        self.heads, self.width = len(alive), 2 * half

        def places(heads: list[int], kept: list[list[int]], width: int) -> Tensor:
            """Dense channel of each padded one, -1 for padding."""
            return torch.tensor([h * d + (own[i] if i < len(own) else -1 - h * d)
                                 for h, own in zip(heads, kept, strict=True) for i in range(width)])  # fmt: skip

        both = [own + [-1] * (half - len(own)) + [p + d // 2 for p in own] for own in pairs]
        both = [[p if p >= 0 else None for p in own] for own in both]

        def pair_places(heads: list[int]) -> Tensor:
            return torch.tensor([
                -1 if i >= len(own) or own[i] is None else h * d + own[i]
                for h, own in zip(heads, (both[j * len(both) // len(heads)] for j in range(len(heads))), strict=True)
                for i in range(self.width)
            ])  # fmt: skip

        query_heads = [h * shared + i for h in alive for i in range(shared)]
        everything = torch.arange(attention.q_proj.in_features)
        self.q = cut(attention.q_proj, pair_places(query_heads), everything)
        self.k = cut(attention.k_proj, pair_places(alive), everything)
        self.v = cut(attention.v_proj, places(alive, values, self.v_width), everything)
        context = places(query_heads, [own for own in values for _ in range(shared)], self.v_width)
        self.o = Residual(attention.o_proj, rows("self_attn.o_proj"), context)
        turn = [0 if i >= len(own) or own[i] is None else own[i] for own in both for i in range(self.width)]
        self.register_buffer("turn", torch.tensor(turn))
        ffn = rows("mlp.up_proj")
        self.gate, self.up = cut(mlp.gate_proj, ffn, everything), cut(mlp.up_proj, ffn, everything)
        self.down = Residual(mlp.down_proj, rows("mlp.down_proj"), ffn)
        self.norm1 = copy.deepcopy(layer.input_layernorm)
        self.norm2 = copy.deepcopy(layer.post_attention_layernorm)

    def forward(self, x: Tensor, attention_mask=None, position_embeddings=None, past_key_values=None, **_) -> Tensor:
        h, shape = self.norm1(x), x.shape[:-1]
        q = self.q(h).view(*shape, self.heads, self.shared, self.width)
        k = self.k(h).view(*shape, self.heads, self.width)
        v = self.v(h).view(*shape, self.heads, self.v_width).transpose(1, 2)
        cos, sin = (t[..., self.turn].view(*t.shape[:2], self.heads, self.width) for t in position_embeddings)
        q = _turned(q, cos.unsqueeze(3), sin.unsqueeze(3)).flatten(2, 3).transpose(1, 2)
        k = _turned(k, cos, sin).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.index)
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, scale=self.scale, enable_gqa=True,
            is_causal=attention_mask is None and q.shape[2] > 1,
        )  # fmt: skip
        x = self.o(context.transpose(1, 2).flatten(2), x)
        h = self.norm2(x)
        return self.down(F.silu(self.gate(h)) * self.up(h), x)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
