"""BERT's block, which most encoders have under names of their own: attention.{self,output}, intermediate, output.

An architecture of it is a file that makes a `BertLike` of transformers' classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ...nn import CompactLinear
from ...nn.hooked import is_hooked
from ..family import Kept, StockConfig
from ..linears import Activation, Make, activation_name
from ..table import Table
from .blocks import CompactSelfAttention, RunsAtOnce, add_residual, run_activated, run_ffn
from .heads import compact_encoder_attention, compact_encoder_ffn
from .norms import make_layer_norms_fast
from .stack import RunsStack
from .step import Parts
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class BertLikeAttention(CompactSelfAttention):
    """Queries, keys and values of the layer; `Residual` has the output projection."""

    names = ("query", "key", "value")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: object = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if past_key_values is not None:
            raise ValueError(
                f"past_key_values must be None (got {type(past_key_values).__name__}): a compact encoder reads no keys "
                "and values but its own, so that prefixes (PEFT's prefix tuning) cannot stand before them"
            )
        return self.attend(hidden_states, attention_mask, **kwargs)


class Residual(nn.Module):
    """The product of `dense` added to the residual, then LayerNorm: self-attention's output and the block's alike."""

    dense: CompactLinear
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(add_residual(self.dense, self.dropout, hidden_states, input_tensor))
        return y


class Intermediate(nn.Module):
    """The first FFN layer, activation fused."""

    dense: CompactLinear
    intermediate_act_fn: Activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        return run_activated(self.dense, self.intermediate_act_fn, hidden_states)


def feed_forward(first: Any, output: Any, x: Tensor) -> Tensor | None:
    """Both FFN layers in one call, then LayerNorm; None where the two modules must be called, as in `run_ffn`."""
    if type(first).forward is not Intermediate.forward or type(output).forward is not Residual.forward:
        return None
    parts = (first.dense, first.intermediate_act_fn, output.dense, output.dropout)
    out = run_ffn((first, output), *parts, x)
    if out is None:
        return None
    y: Tensor = output.LayerNorm(out)
    return y


class BertLikeLayer(RunsAtOnce):
    """All in one call, or both FFN layers, unless someone listens to the modules around them."""

    attention: Any  # transformers' own, around the self-attention and its output
    intermediate: Intermediate
    output: Residual
    chunk_size_feed_forward: int
    containers: tuple[type]  # the class of `attention`

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> Tensor:
        others = encoder_hidden_states is not None or past_key_values is not None or kwargs.get("is_causal")
        if not others and not self.chunk_size_feed_forward:
            whole = self.at_once(hidden_states, attention_mask)
            if whole is not None:
                return whole
        rest = (encoder_hidden_states, encoder_attention_mask, past_key_values)
        y: Tensor = super().forward(hidden_states, attention_mask, *rest, **kwargs)
        return y

    def parts(self) -> Parts | None:
        """See `RunsAtOnce`."""
        around: Any = self.attention
        first, second = self.intermediate, self.output
        if (type(around),) != self.containers:
            return None
        attention, output = around.self, around.output
        if type(attention).forward is not BertLikeAttention.forward:
            return None
        own = (Residual.forward, Intermediate.forward, Residual.forward)
        if tuple(type(module).forward for module in (output, first, second)) != own:
            return None
        dropouts = (attention.dropout, output.dropout, second.dropout)
        return Parts(attention, output.dense, output.LayerNorm, first.dense, first.intermediate_act_fn, second.dense,
                     second.LayerNorm, dropouts, (around, output, first, second))  # fmt: skip

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        y = feed_forward(self.intermediate, self.output, attention_output)
        if y is None:
            y = super().feed_forward_chunk(attention_output)  # type: ignore[misc]  # of the layer this is mixed into
        return y


class Pooler(nn.Module):
    """To be mixed into transformers' pooler, the first token's state through a linear and tanh.

    `rests`: whether nobody reads what it gives, as in the pipelines of sentence-transformers that pool hidden states
    themselves: it then gives None, and computes nothing (two hundredths of the time of one text of half of MiniLM-L6).
    """

    rests = False

    def forward(self, hidden_states: Tensor) -> Tensor | None:
        if self.rests and not is_hooked(self):
            return None
        y: Tensor = super().forward(hidden_states)
        return y


def rest_pooler(model: nn.Module, rests: bool = True) -> None:
    """Say of the pooler of a model without a head, where it has one, whether it rests: see `Pooler`."""
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, Pooler):
        pooler.rests = rests


class CompactClasses(NamedTuple):
    """What the modules of a block become. The family's file has each under its own name: pickles ask for it there."""

    attention: type[Any]
    self_output: type[Any]
    intermediate: type[Any]
    output: type[Any]
    layer: type[Any]
    encoder: type[Any]
    pooler: type[Any] | None


class BertLike:
    """A family (see `families.family.Family`) of BERT's block.

    hf: transformers' file of the architecture. prefix: what the names of its classes begin with. file: `__name__` of
    the family's own file. counts_from_padding: whether the first token's position follows that of padding.
    """

    def __init__(self, hf: ModuleType, prefix: str, file: str, counts_from_padding: bool = False):
        self.layer: type[Any] = getattr(hf, f"{prefix}Layer")
        self.counts_from_padding = counts_from_padding

        def compact(part: str, mixed_in: type, **own: Any) -> type[Any]:
            bases = (mixed_in, getattr(hf, f"{prefix}{part}"))
            return type(f"Compact{prefix}{part}", bases, {"__module__": file, "__doc__": mixed_in.__doc__, **own})

        self.encoder: type[Any] = getattr(hf, f"{prefix}Encoder")
        self.pooler: type[Any] | None = getattr(hf, f"{prefix}Pooler", None)
        layer = compact("Layer", BertLikeLayer, containers=(getattr(hf, f"{prefix}Attention"),))
        self.compact = CompactClasses(
            compact("SelfAttention", BertLikeAttention, eager=staticmethod(hf.eager_attention_forward)),
            compact("SelfOutput", Residual),
            compact("Intermediate", Intermediate),
            compact("Output", Residual),
            layer,
            compact("Encoder", RunsStack, block=layer),
            compact("Pooler", Pooler) if self.pooler is not None else None,
        )

    def blocks(self, model: PreTrainedModel) -> list[tuple[nn.Module, EncoderBlock]]:
        """Every layer of the encoder, and the module names of its linears."""
        found = []
        for name, module in model.named_modules():
            if isinstance(module, self.layer):
                own = f"{name}.attention.self."
                attention = (own + "query", own + "key", own + "value", f"{name}.attention.output.dense")
                found.append((module, EncoderBlock(*attention, f"{name}.intermediate.dense", f"{name}.output.dense")))
        return found

    def table(self, model: PreTrainedModel) -> Table:
        """As `Family.table`. ValueError for a model used as a decoder and for an activation not zero at zero."""
        refuse_decoder(model)
        activation_name(model.config.hidden_act)
        return encoder_table(model, [b for _, b in self.blocks(model)], model.config.num_attention_heads)

    def rebuild(self, model: PreTrainedModel, plan: Kept, make: Make) -> None:
        """Turn every block into a compact one, in place."""
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        module: Any
        for module, block in self.blocks(model):
            attention, output = module.attention.self, module.attention.output
            linears, layout = compact_encoder_attention(make, plan, block, head_dim)
            attention.__class__, output.__class__ = self.compact.attention, self.compact.self_output
            attention.make_compact(linears[:3], layout)
            output.dense = linears[3]
            make_ffn_compact(module, block, plan, make, model.config)
            module.intermediate.__class__, module.output.__class__ = self.compact.intermediate, self.compact.output
            module.__class__ = self.compact.layer
        for own, compact in ((self.encoder, self.compact.encoder), (self.pooler, self.compact.pooler)):
            for module in [module for module in model.modules() if type(module) is own]:
                module.__class__ = compact
        make_layer_norms_fast(model)

    def stock(self, config: PretrainedConfig) -> StockConfig:
        """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said."""
        return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))

    def most_tokens(self, config: PretrainedConfig) -> int:
        """As `Family.most_tokens`."""
        positions: int = config.max_position_embeddings
        return positions - (config.pad_token_id + 1 if self.counts_from_padding else 0)


def refuse_decoder(model: PreTrainedModel) -> None:
    """ValueError for a model that generates, or reads another's states: its blocks have more than these linears."""
    if model.config.is_decoder or model.config.add_cross_attention:
        raise ValueError(
            f"{type(model).__name__}: is_decoder and add_cross_attention must be False; prunekern prunes "
            f"{model.config.model_type} as an encoder only"
        )


def make_ffn_compact(module: Any, block: EncoderBlock, plan: Kept, make: Make, config: PretrainedConfig) -> None:
    """Both FFN layers of a block, and the activation between them; their classes are left to the caller."""
    module.intermediate.dense, module.output.dense = compact_encoder_ffn(make, plan, block)
    module.intermediate.intermediate_act_fn = Activation(activation_name(config.hidden_act))
