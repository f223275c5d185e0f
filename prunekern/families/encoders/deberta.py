"""DeBERTa-v2 and v3: the blocks of BERT with attention by content and by relative position.

A query channel that is pruned adds exactly zero to all terms of the logits where the projections of content are those
of positions, too (`share_att_key`, in every published model): q_i k_j and q_i pos_key have no q_i, and k_j pos_query
has none of pos_query. With projections of their own, one term alone can be exact: keys of positions fall with the rows
of q ("c2p"), or queries of positions with those of k, which then are the carrier ("p2c"). With both, a row of q leaves
k_j pos_query as it was, and one of k leaves q_i pos_key: refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from ...nn import CompactLinear
from ...nn.hooked import is_hooked
from ...ops import calls
from ..family import Kept, StockConfig
from ..linears import Activation, Make, activation_name, dense_layer, full_or
from ..table import Group, Table
from .blocks import add_residual, run_activated, run_ffn
from .deberta_attention import CompactDisentangledSelfAttention, terms
from .deberta_given import Given
from .heads import compact_encoder_attention, compact_encoder_ffn
from .norms import CompactLayerNorm, make_layer_norms_fast
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _CompactResidual(nn.Module):
    """The product of `dense` added to the residual, then LayerNorm: DebertaV2SelfOutput and DebertaV2Output alike."""

    dense: CompactLinear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(add_residual(self.dense, self.dropout, hidden_states, input_tensor))
        return y


class CompactDebertaV2SelfOutput(_CompactResidual, hf.DebertaV2SelfOutput):
    pass


class CompactDebertaV2Output(_CompactResidual, hf.DebertaV2Output):
    pass


class CompactDebertaV2Intermediate(hf.DebertaV2Intermediate):
    """The first FFN layer, activation fused."""

    dense: CompactLinear
    intermediate_act_fn: Activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        return run_activated(self.dense, self.intermediate_act_fn, hidden_states)


class CompactDebertaV2Layer(hf.DebertaV2Layer):
    """Both FFN layers in one call, unless someone listens to the modules around them."""

    attention: Any  # transformers' own, around the self-attention and its output
    intermediate: Any
    output: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.attention(
            hidden_states, attention_mask, output_attentions=output_attentions, query_states=query_states,
            relative_pos=relative_pos, rel_embeddings=rel_embeddings,
        )  # fmt: skip
        first, output, out = self.intermediate, self.output, None
        if type(first) is CompactDebertaV2Intermediate and type(output) is CompactDebertaV2Output:
            parts = (first.dense, first.intermediate_act_fn, output.dense, output.dropout)
            out = run_ffn((first, output), *parts, attended)
        y: Tensor = output(first(attended), attended) if out is None else output.LayerNorm(out)
        return y, weights if output_attentions else None


class CompactDebertaV2Encoder(hf.DebertaV2Encoder):
    """What all its blocks are given is made once, and known to them; see `deberta_given`."""

    given: Given

    def get_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """[batch, tokens] -> [batch, 1, tokens, tokens]; others as transformers has it."""
        mask: Tensor = super().get_attention_mask(attention_mask)
        if attention_mask.dim() == 2 and not torch.compiler.is_compiling():
            self.given.see_mask(attention_mask, mask)
        return mask

    def get_rel_pos(
        self, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None
    ) -> Tensor | None:
        """int64 [1, tokens, tokens], of one length the same tensor at every call."""
        make = super().get_rel_pos
        found: Tensor | None
        if not self.relative_attention or relative_pos is not None or query_states is not None:
            found = make(hidden_states, query_states, relative_pos)
        elif not calls.plain_eager(hidden_states):
            found = make(hidden_states)
        else:
            key = (hidden_states.shape[-2], hidden_states.device, self.position_buckets, self.max_relative_positions)
            found = self.given.relative(key, lambda: make(hidden_states))
        return found

    def get_rel_embedding(self) -> Tensor | None:
        """[positions, hidden], normed where the config says so; the same tensor until its parameters change."""
        make = super().get_rel_embedding
        fixed: list[tuple[dict[str, Any], str]] = []
        owners: tuple[nn.Module, ...] = ()
        if self.relative_attention:
            owners, fixed = (self.rel_embeddings,), [(self._modules, "rel_embeddings")]
        if owners and "layer_norm" in self.norm_rel_ebd:
            norm = self.LayerNorm
            owners = (*owners, norm)
            fixed += [(self._modules, "LayerNorm"), (norm.__dict__, "eps"), (norm.__dict__, "normalized_shape")]
        found: Tensor | None = self.given.embedded(owners, fixed, make) if _may_keep(*owners) else make()
        return found


def _may_keep(*owners: nn.Module) -> bool:
    """Whether what these modules give need not be computed at every call."""
    if not owners or torch.compiler.is_compiling() or not calls.unwatched() or is_hooked(*owners):
        return False
    if any(type(module) not in (nn.Embedding, nn.LayerNorm, CompactLayerNorm) for module in owners):
        return False
    return not calls.needs_grad(*(p for module in owners for p in module._parameters.values()))


def blocks(model: PreTrainedModel) -> list[tuple[hf.DebertaV2Layer, EncoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, hf.DebertaV2Layer):
            a, o = f"{name}.attention.self.", f"{name}.attention.output.dense"
            names = (a + "query_proj", a + "key_proj", a + "value_proj", o)
            found.append((module, EncoderBlock(*names, f"{name}.intermediate.dense", f"{name}.output.dense")))
    return found


def _position_layer(config: PretrainedConfig, block: EncoderBlock) -> str | None:
    """The projection of positions that a block has besides those of content; None where it has none."""
    own = {"c2p": block.k.replace("key_proj", "pos_key_proj"), "p2c": block.q.replace("query_proj", "pos_query_proj")}
    found = [own[term] for term in terms(config)]
    return found[0] if found and not getattr(config, "share_att_key", False) else None


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`. ValueError for an activation that is not zero at zero, and for projections of positions that
    leave no query/key channel that vanishes as a whole.
    """
    config = model.config
    activation_name(config.hidden_act)
    if len(terms(config)) == 2 and not getattr(config, "share_att_key", False):
        raise ValueError(
            f"{type(model).__name__}: config.share_att_key must be True where config.pos_att_type has both c2p and p2c "
            "(got False): a query channel that is gone would leave what its key makes of positions, and the other way "
            "round; accepted besides: one of the two alone"
        )
    whole = encoder_table(model, [b for _, b in blocks(model)], config.num_attention_heads)
    layers, groups = dict(whole.layers), dict(whole.groups)
    for _, block in blocks(model):
        name = _position_layer(config, block)
        if name is not None:
            layers[name] = dense_layer(model, name)
            old = groups.pop(block.q)
            carrier, partner = (block.q, block.k) if "c2p" in terms(config) else (block.k, block.q)
            fall = {partner: old.rows, name: old.rows}
            groups[carrier] = Group("query_key", carrier, old.rows, fall, head=old.head, lives_by=old.lives_by)
    return Table(layers, groups)


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    activation = activation_name(model.config.hidden_act)
    for encoder in [m for m in model.modules() if isinstance(m, hf.DebertaV2Encoder)]:
        encoder.given = Given()
        encoder.__class__ = CompactDebertaV2Encoder
        for layer in encoder.layer:
            layer.attention.self.given = encoder.given
    for module, block in blocks(model):
        attention = module.attention.self
        linears, layout = compact_encoder_attention(make, plan, block, attention.attention_head_size)
        attention.__class__ = CompactDisentangledSelfAttention
        attention.make_compact(linears[:3], layout)
        positions = _position_layer(model.config, block)
        if positions is not None:
            padded = layout.heads * layout.width
            own = make(positions, None, full_or(layout.query, padded), padded, "none")
            setattr(attention, positions.rpartition(".")[2], own)
        module.attention.output.dense = linears[3]
        module.attention.output.__class__ = CompactDebertaV2SelfOutput
        module.intermediate.dense, module.output.dense = compact_encoder_ffn(make, plan, block)
        module.intermediate.intermediate_act_fn = Activation(activation)
        module.intermediate.__class__ = CompactDebertaV2Intermediate
        module.output.__class__ = CompactDebertaV2Output
        module.__class__ = CompactDebertaV2Layer
    make_layer_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))


def most_tokens(config: PretrainedConfig) -> int | None:
    """Relative positions end in one for all that are far: only absolute ones have a limit."""
    positions: int = config.max_position_embeddings
    return positions if getattr(config, "position_biased_input", True) else None
