"""MPNet: attention.attn.{q,k,v,o} and BERT's FFN; a bias by relative position meets the logits of every block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mpnet import modeling_mpnet as hf

from ...nn import CompactLinear
from ...nn.compact_attention import Layers
from ...nn.hooked import is_hooked
from ...ops.seen import fingerprint, version_of
from ..family import Kept, StockConfig
from ..linears import Make, activation_name
from ..table import Table
from .bert_like import Intermediate, Residual, feed_forward, make_ffn_compact
from .blocks import CompactSelfAttention, RunsAtOnce, add_residual
from .heads import compact_encoder_attention
from .norms import make_layer_norms_fast
from .step import Parts, takes
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class WholeKeys(NamedTuple):
    """What a mask that is added to the logits allows, where it forbids whole keys only and no sequence all of its own
    (of such a one, transformers' answer is the mean of what it forbids).
    """

    mask: Tensor | None  # [batch, 1, tokens, tokens]
    made_of: tuple[int, int]  # its version and the fingerprint of its values
    allowed: Tensor | None  # bool [batch, 1, 1, tokens]; None: all

    def are_of(self, mask: Tensor | None) -> bool:
        """Whether this is the mask they were made of, unchanged."""
        if mask is None or mask is not self.mask:
            return mask is self.mask
        version, values = self.made_of
        if version < 0 or not values:  # nothing tells whether it was written to
            return False
        return version == version_of(mask) and values == fingerprint(mask)


def whole_keys(mask: Tensor | None) -> WholeKeys | None:
    """None for any other mask."""
    if mask is None:
        return WholeKeys(None, (0, 0), None)
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_floating_point():
        return None
    first = mask[:, :, :1]
    allowed = first == 0
    if not bool((allowed | (first == torch.finfo(mask.dtype).min)).all() & allowed.any(-1).all()):
        return None
    if not torch.equal(mask, first.expand_as(mask)):
        return None
    return WholeKeys(mask, (version_of(mask), fingerprint(mask)), allowed)


class CompactMPNetSelfAttention(CompactSelfAttention, hf.MPNetSelfAttention):
    """Called by itself: heads padded to the widest one, in PyTorch's own attention, which takes a bias as well."""

    names = ("q", "k", "v")
    o: CompactLinear
    heads: tuple[int, ...]  # those of the dense layer that are left

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

    def _is_plain(self) -> bool:
        return not (self.training and self._dropout_rate() > 0)

    def _runs_ragged(self, x: Tensor, layers: Layers) -> bool:
        return False

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
            if len(self.heads) < position_bias.shape[1]:
                position_bias = position_bias[:, torch.tensor(self.heads, device=x.device)]
            added = position_bias if added is None else position_bias + added
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


class CompactMPNetLayer(RunsAtOnce, hf.MPNetLayer):
    """All in one call, or both FFN layers, unless someone listens to the modules around them."""

    attention: Any  # of the classes above, unless somebody put others there
    intermediate: Any
    output: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        keys: WholeKeys | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """keys: of attention_mask, from `CompactMPNetEncoder`."""
        if position_bias is not None and not output_attentions and takes(hidden_states):
            if keys is None or not keys.are_of(attention_mask):
                keys = whole_keys(attention_mask)
            whole = None if keys is None else self.at_once(hidden_states, keys.allowed, position_bias)
            if whole is not None:
                return (whole,)
        options = {"position_bias": position_bias, "output_attentions": output_attentions}
        attended, *weights = self.attention(hidden_states, attention_mask, **options)
        y = feed_forward(self.intermediate, self.output, attended)
        return (self.output(self.intermediate(attended), attended) if y is None else y, *weights)

    def parts(self) -> Parts | None:
        """See `RunsAtOnce`."""
        around, first, second = self.attention, self.intermediate, self.output
        if type(around) is not CompactMPNetAttention or type(around.attn) is not CompactMPNetSelfAttention:
            return None
        if type(first) is not CompactMPNetIntermediate or type(second) is not CompactMPNetOutput:
            return None
        attn = around.attn
        return Parts(attn, attn.o, around.LayerNorm, first.dense, first.intermediate_act_fn, second.dense,
                     second.LayerNorm, (attn.dropout, around.dropout, second.dropout), (around, first, second),
                     attn.heads)  # fmt: skip


class CompactMPNetEncoder(hf.MPNetEncoder):
    """Makes the bias once for all sequences of a batch, and asks once what the mask allows."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        keys = whole_keys(attention_mask) if takes(hidden_states) else None
        return super().forward(hidden_states, attention_mask, **kwargs, keys=keys)

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
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    for module, block in blocks(model):
        attention, attn = module.attention, module.attention.attn
        linears, layout = compact_encoder_attention(make, plan, block, head_dim)
        attention.__class__, attn.__class__ = CompactMPNetAttention, CompactMPNetSelfAttention
        attn.config, attn.scaling = model.config, head_dim**-0.5
        attn.make_compact(linears[:3], layout)
        attn.o = linears[3]
        attn.heads = tuple(torch.unique(plan.layers[block.v].rows // head_dim).tolist())
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
