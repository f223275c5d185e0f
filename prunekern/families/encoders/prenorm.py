"""Pre-norm encoder blocks, as ViT and CLIP have them: x + o(attention(norm(x))), then x + down(act(up(norm(x))))."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...nn import mlp_call
from ...nn.compact_attention import Layers
from ...nn.hooked import is_hooked, is_replaced
from ...nn.indexed import pick_channels
from ..family import Kept
from ..key_masks import causal_key_mask_of, for_each
from ..linears import Activation, Make, activation_name
from ..table import Group, Layer, Table
from .blocks import CompactSelfAttention, drops
from .heads import EncoderLayout, compact_encoder_attention, compact_encoder_ffn
from .norms import make_layer_norms_fast
from .table import EncoderBlock, encoder_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PreNormAttention(CompactSelfAttention):
    """Attention whose dropout is a number, and which may be causal: to be mixed into a family's self-attention.

    As `CompactSelfAttention`; a causal one runs on ragged heads for masks that forbid whole keys and what follows a
    query.
    """

    names = ("q_proj", "k_proj", "v_proj")
    output: str  # what o is called
    dropout_rate: str  # what the dropout of attention weights is called

    def make_compact(
        self, linears: tuple[nn.Module, nn.Module, nn.Module], layout: EncoderLayout, causal: bool = False
    ) -> None:
        """Take q, k and v of a block, in place of the dense ones. causal: as the model around it calls it."""
        super().make_compact(linears, layout)
        self.ragged.causal = causal

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [batch, tokens, hidden] -> the same, and attention weights or None."""
        context, weights = self.attend(hidden_states, attention_mask, **kwargs)
        return self._modules[self.output](context), weights

    def attend(self, x: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x: [batch, tokens, hidden] -> [batch, tokens, kept value channels], and attention weights or None."""
        is_causal = bool(kwargs.get("is_causal", False))
        if self.padded[0] == 0 or not (is_causal or self.ragged.causal):
            return super().attend(x, mask, **kwargs)
        layers = self._layers()
        if is_causal and self.ragged.causal and self._runs_ragged(x, layers):
            is_plain, key_mask = causal_key_mask_of(mask)
            if is_plain:
                return self.ragged(x, layers, for_each(key_mask, len(x)), fuses=True), None
        return self._attend_padded(x, layers, mask, **kwargs)

    def _dropout_rate(self) -> float:
        rate: float = getattr(self, self.dropout_rate)
        return rate

    def _attend_padded(
        self, x: Tensor, layers: Layers, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        heads, width = self.padded
        shape = (*x.shape[:-1], heads, width)
        query, key, value = (layer(x).view(shape).transpose(1, 2) for layer in layers)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        dropout = self._dropout_rate() if self.training else 0.0
        out, weights = interface(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out, kept = out.reshape(*x.shape[:-1], heads * width), getattr(layers[2], "out_index", self.value_at)
        return out.contiguous() if kept is None else pick_channels(out, kept.to(out.device)), weights


class PreNormLayer(nn.Module):
    """A block whose projections write into the residual directly: to be mixed into a family's encoder layer."""

    parts: tuple[str, str, str]  # what attention, the norm before it and the norm before the FFN are called
    mlp_class: type[Any]  # of fc1, activation_fn and fc2
    _modules: dict[str, Any]  # of a dropout after both, where a family has one

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states: [batch, tokens, hidden] -> the same."""
        attention, norm, mlp_norm = (self._modules[name] for name in self.parts)
        mlp: Any = self._modules["mlp"]
        dropout = self._modules.get("dropout")
        attended: Tensor
        x: Tensor = norm(hidden_states)
        if _runs_inside(attention, dropout):
            context, _ = attention.attend(x, attention_mask, **kwargs)
            attended = attention._modules[attention.output](context, residual=hidden_states)
        else:
            attended = hidden_states + _dropped(dropout, attention(x, attention_mask=attention_mask, **kwargs)[0])
        x = mlp_norm(attended)
        if type(mlp) is self.mlp_class and type(mlp.activation_fn) is Activation and not _drops(dropout):
            up, down = mlp.fc1, mlp.fc2
            if not (is_hooked(mlp, up, mlp.activation_fn, down) or is_replaced(up, down)):
                return mlp_call(up, down, x, attended, mlp.activation_fn.name)
        return attended + _dropped(dropout, mlp(x))


def _runs_inside(attention: Any, dropout: nn.Module | None) -> bool:
    """Whether nobody would notice that attention and its output projection are not called as modules."""
    if getattr(type(attention), "forward", None) is not PreNormAttention.forward or _drops(dropout):
        return False
    o = attention._modules[attention.output]
    return not (is_hooked(attention, o) or is_replaced(o))


def _drops(dropout: nn.Module | None) -> bool:
    return dropout is not None and (drops(dropout) or is_hooked(dropout))


def _dropped(dropout: nn.Module | None, x: Tensor) -> Tensor:
    return x if dropout is None else dropout(x)


@dataclass(frozen=True)
class PreNormClasses:
    """transformers' block of a family, and the compact classes of it and of its attention."""

    layer: type
    attention: type
    compact_layer: type


class Found(NamedTuple):
    """A block of a model."""

    module: Any
    block: EncoderBlock
    classes: PreNormClasses


def found_blocks(model: PreTrainedModel, known: Iterable[PreNormClasses]) -> list[Found]:
    """Every block of one of these classes, in the order they stand in the model."""
    known, found = tuple(known), []
    for name, module in model.named_modules():
        classes = next((classes for classes in known if isinstance(module, classes.layer)), None)
        if classes is not None:
            compact: Any = classes.compact_layer
            a = f"{name}.{compact.parts[0]}."
            linears = (a + "q_proj", a + "k_proj", a + "v_proj", a + classes.attention.output)  # type: ignore[attr-defined]
            found.append(Found(module, EncoderBlock(*linears, f"{name}.mlp.fc1", f"{name}.mlp.fc2"), classes))
    return found


def prenorm_table(model: PreTrainedModel, found: Iterable[Found]) -> Table:
    """The table of blocks that may differ in width and number of heads. ValueError for an activation that is not zero
    at zero.
    """
    layers: dict[str, Layer] = {}
    groups: dict[str, Group] = {}
    for module, block, classes in found:
        activation_name(module.mlp.config.hidden_act)
        attention = _attention(module, classes)
        heads = dense_width(model, block) // attention.head_dim
        own = encoder_table(model, [block], heads)
        layers |= own.layers
        groups |= own.groups
    return Table(layers, groups)


def dense_width(model: PreTrainedModel, block: EncoderBlock) -> int:
    """Query channels before anything was pruned."""
    q: Any = model.get_submodule(block.q)
    rows: int = getattr(q, "dense_shape", q.weight.shape)[0]
    return rows


def rebuild_prenorm(
    model: PreTrainedModel, found: Iterable[Found], plan: Kept, make: Make, causal: Mapping[str, bool] | None = None
) -> None:
    """Turn these blocks into compact ones, in place. causal: by the name of q, those whose attention is."""
    for module, block, classes in found:
        attention, mlp = _attention(module, classes), module.mlp
        linears, layout = compact_encoder_attention(make, plan, block, attention.head_dim)
        attention.__class__ = classes.attention
        attention.make_compact(linears[:3], layout, (causal or {}).get(block.q, False))
        setattr(attention, attention.output, linears[3])
        mlp.fc1, mlp.fc2 = compact_encoder_ffn(make, plan, block)
        mlp.activation_fn = Activation(activation_name(mlp.config.hidden_act))
        module.__class__ = classes.compact_layer
    make_layer_norms_fast(model)


def _attention(module: Any, classes: PreNormClasses) -> Any:
    compact: Any = classes.compact_layer
    return getattr(module, compact.parts[0])
