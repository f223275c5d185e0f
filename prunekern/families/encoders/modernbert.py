"""ModernBERT: fused attn.Wqkv and mlp.Wi, rotary positions, local and global attention in turns, norms before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert as hf

from ...nn import mlp_call
from ...nn.hooked import is_hooked, is_replaced
from ..decoders.heads import compact_decoder_attention, compact_decoder_ffn
from ..decoders.table import ROTARY, DecoderBlock, DecoderHeads, decoder_table
from ..family import Kept, StockConfig
from ..fused import SplitLinear
from ..linears import Activation, Make, activation_name
from ..table import Table
from .norms import make_layer_norms_fast
from .prenorm_step import Parts, PrenormStep, make_prenorm_step
from .rotary import CompactRotaryAttention, Turns
from .step import takes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Wqkv makes queries, keys and values; Wi what goes through the activation, and what it is multiplied with.
ATTENTION, FFN = ("q", "k", "v"), ("gate", "up")


class CompactModernBertAttention(CompactRotaryAttention, hf.ModernBertAttention):
    eager = staticmethod(hf.eager_attention_forward)


class CompactModernBertMLP(hf.ModernBertMLP):
    """Wo(act(gate(x)) * up(x)): layer by layer; the block has one call for it."""

    Wi: SplitLinear
    Wo: nn.Module
    act: nn.Module
    drop: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = (self.Wi.get_submodule(name) for name in FFN)
        y: Tensor = self.Wo(self.drop(self.act(gate(hidden_states)) * up(hidden_states)))
        return y


class CompactModernBertEncoderLayer(hf.ModernBertEncoderLayer):
    """A block that is one C++ call where it is an ordinary one; else its projections write into the residual directly,
    unless someone listens to the modules around them.
    """

    attn: Any  # CompactModernBertAttention and CompactModernBertMLP, unless somebody put others there
    mlp: Any
    attn_norm: nn.Module
    mlp_norm: nn.Module
    _step: PrenormStep | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Turns = None,  # type: ignore[assignment]  # transformers always gives them
        **kwargs: Any,
    ) -> Tensor:
        whole = self._at_once(hidden_states, position_embeddings, attention_mask)
        if whole is not None:
            return whole
        attention = self.attn
        x = self.attn_norm(hidden_states)
        attended: Tensor
        if type(attention) is not CompactModernBertAttention or _adds_alone(attention, attention.Wo):
            out = attention(x, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs)
            attended = hidden_states + out[0]
        else:
            context, _ = attention.attend(x, position_embeddings, attention_mask, **kwargs)
            attended = attention.Wo(context, residual=hidden_states)
        x = self.mlp_norm(attended)
        y = _ffn(self.mlp, x, attended)
        return attended + self.mlp(x) if y is None else y

    def _at_once(self, x: Tensor, turns: Turns, mask: Tensor | None) -> Tensor | None:
        """The block's output; None where its modules must be called."""
        if not takes(x):
            return None
        step = self._step
        if step is None or not step.is_fresh():
            parts = self._parts()
            step = self._step = None if parts is None else make_prenorm_step(self, parts)
        return None if step is None else step(x, turns, mask)

    def _parts(self) -> Parts | None:
        """The modules the call stands for; None where one of them is not ours."""
        attention, mlp = self.attn, self.mlp
        if type(attention) is not CompactModernBertAttention or type(mlp) is not CompactModernBertMLP:
            return None
        if type(attention.Wqkv) is not SplitLinear or type(mlp.Wi) is not SplitLinear:
            return None
        gate, up = (mlp.Wi._modules[name] for name in FFN)
        return Parts(attention, attention.Wo, self.attn_norm, up, gate, mlp.act, mlp.Wo, self.mlp_norm,
                     (attention.out_drop, mlp.drop), (attention.Wqkv, mlp, mlp.Wi))  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return {**self.__dict__, "_step": None}


def _adds_alone(attention: CompactModernBertAttention, o: nn.Module) -> bool:
    """Whether the product of o cannot be added to the residual as it is made."""
    return _drops(attention.out_drop) or is_hooked(attention, o, attention.out_drop) or is_replaced(o)


def _drops(dropout: nn.Module) -> bool:
    """Whether it does anything, or is another module in the place of transformers' own."""
    if type(dropout) is nn.Identity:
        return False
    return type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)


def _ffn(mlp: nn.Module, x: Tensor, residual: Tensor) -> Tensor | None:
    """residual + mlp(x) as one call; None where the modules must be called one by one."""
    if type(mlp) is not CompactModernBertMLP or type(mlp.Wi) is not SplitLinear or type(mlp.act) is not Activation:
        return None
    gate, up = (mlp.Wi._modules[name] for name in FFN)
    assert gate is not None and up is not None
    if _drops(mlp.drop) or is_replaced(gate, up, mlp.Wo) or is_hooked(mlp, mlp.Wi, gate, up, mlp.act, mlp.drop, mlp.Wo):
        return None
    layers: tuple[Any, ...] = (up, mlp.Wo, gate)
    return mlp_call(layers[0], layers[1], x, residual, mlp.act.name, layers[2])


def blocks(model: PreTrainedModel) -> list[tuple[nn.Module, DecoderBlock]]:
    """Every layer of the encoder, and the module names of its linears."""
    found: list[tuple[nn.Module, DecoderBlock]] = []
    for name, module in model.named_modules():
        if isinstance(module, hf.ModernBertEncoderLayer):
            q, k, v = (f"{name}.attn.Wqkv.{part}" for part in ATTENTION)
            gate, up = (f"{name}.mlp.Wi.{part}" for part in FFN)
            found.append((module, DecoderBlock(q, k, v, f"{name}.attn.Wo", gate, up, f"{name}.mlp.Wo")))
    return found


def fused(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """As `Family.fused`."""
    width, inner = model.config.hidden_size, int(model.config.intermediate_size)
    found = {}
    for _, block in blocks(model):
        found[block.q.rpartition(".")[0]] = dict.fromkeys(ATTENTION, width)
        found[block.up.rpartition(".")[0]] = dict.fromkeys(FFN, inner)
    return found


def table(model: PreTrainedModel) -> Table:
    """As `Family.table`, of a model whose fused linears are split.

    ValueError for an activation that is not zero at zero and for unknown rotary pairs.
    """
    activation_name(model.config.hidden_activation)
    return decoder_table(model, [b for _, b in blocks(model)], _heads(model.config))


def _heads(config: PretrainedConfig) -> DecoderHeads:
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for layer_type in sorted(set(config.layer_types)):
        rope = config.rope_parameters[layer_type] or {}
        kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
        if kind not in ROTARY:
            raise ValueError(
                f"modernbert: rope_parameters[{layer_type!r}] must have a rope_type of {', '.join(ROTARY)}, whose "
                f"rotary pairs are known (got {kind!r})"
            )
        if share != 1.0 or dim % 2:
            raise ValueError(
                f"modernbert: every channel of a head must be of a rotary pair (got partial_rotary_factor {share} in "
                f"rope_parameters[{layer_type!r}], heads of {dim} channels)"
            )
    return DecoderHeads(heads, heads, dim)


def rebuild(model: PreTrainedModel, plan: Kept, make: Make) -> None:
    """Turn every block into a compact one, in place."""
    heads, activation = _heads(model.config), activation_name(model.config.hidden_activation)
    for module, block in blocks(model):
        attention: Any = module.attn
        mlp: Any = module.mlp
        linears, layout = compact_decoder_attention(make, plan, block, heads)
        attention.__class__ = CompactModernBertAttention
        attention.make_compact(linears, layout)
        mlp.Wi.gate, mlp.Wi.up, mlp.Wo = compact_decoder_ffn(make, plan, block)
        mlp.act = Activation(activation)
        mlp.__class__ = CompactModernBertMLP
        module.__class__ = CompactModernBertEncoderLayer
    make_layer_norms_fast(model)


def stock(config: PretrainedConfig) -> StockConfig:
    """The width of a head is hidden_size / num_attention_heads: fewer heads of that width cannot be said."""
    return StockConfig(config.num_attention_heads, config.num_attention_heads, False, (config.num_attention_heads,))


def most_tokens(config: PretrainedConfig) -> int:
    """As `Family.most_tokens`."""
    positions: int = config.max_position_embeddings
    return positions
