"""Which kind of weights the files of a compact model hold: what stands in its config where they are few-bit ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..ops.packing import WEIGHTS

if TYPE_CHECKING:
    from .held import Held
    from .plan import Plan

_FIELDS = ("weights", "layers", "head", "embeddings")
# What a tensor of a kind is called in safetensors' headers.
NAMES = {"fp32": "F32", "bf16": "BF16", "int8": "I8", "int4": "U8"}
ROUNDED = ("int8", "int4")  # kinds that come with a scale


@dataclass(frozen=True)
class Stored:
    """The kinds of weights in files.

    weights: that of block linears; layers: by name in the plan, those of another kind. head: that of the head of a
    causal language model; None for other models. embeddings: that of the table of the input embeddings, which is int8
    or int4 only where the head is tied to it.
    """

    weights: str
    layers: Mapping[str, str]
    head: str | None
    embeddings: str

    @classmethod
    def of(cls, weights: str, names: Iterable[str], held: Held | None, has_head: bool, tied: bool) -> Stored:
        """Of a model with block linears of these names, for which `calibrate` chose `held`."""
        kinds = {name: weights if held is None else held.kind(name, weights) for name in names}
        head = None if not has_head else weights if held is None else held.head_kind(weights)
        table = head if tied and head is not None else "fp32" if weights == "fp32" else "bf16"
        return cls(weights, {name: kind for name, kind in kinds.items() if kind != weights}, head, table)

    def kind(self, name: str) -> str:
        """What the layer `name` is stored in."""
        return self.layers.get(name, self.weights)

    def renamed(self, rename: Callable[[str], str]) -> Stored:
        """The same for a model whose layers are called otherwise."""
        layers = {rename(name): kind for name, kind in self.layers.items()}
        return Stored(self.weights, layers, self.head, self.embeddings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in _FIELDS} | {"layers": dict(self.layers)}

    @classmethod
    def from_dict(cls, data: Any, plan: Plan) -> Stored:
        """The inverse of `to_dict`. ValueError names what is wrong with it, or the layer that `plan` does not have."""
        if not isinstance(data, Mapping) or set(data) != set(_FIELDS) or not isinstance(data["layers"], Mapping):
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"stored: must be a mapping with {', '.join(_FIELDS)} (got {got})")
        kinds = {name: data[name] for name in ("weights", "embeddings")}
        kinds |= {} if data["head"] is None else {"head": data["head"]}
        kinds |= {f"layer {name!r}": kind for name, kind in data["layers"].items()}
        for what, kind in kinds.items():
            if kind not in WEIGHTS:
                raise ValueError(f"stored: {what} must be one of {', '.join(WEIGHTS)} (got {kind!r})")
        for name in data["layers"]:
            if name not in plan.layers:
                raise ValueError(f"stored: layer {name!r} is not in the plan; the files are those of another model")
        if data["embeddings"] in ROUNDED and data["embeddings"] != data["head"]:
            raise ValueError(
                f"stored: embeddings must be fp32, bf16, or as the head is (got {data['embeddings']!r}, and head "
                f"{data['head']!r})"
            )
        return cls(**{name: data[name] for name in _FIELDS} | {"layers": dict(data["layers"])})


def remember(model: nn.Module, weights: str | None) -> None:
    """That the files of `model` hold this kind, so that `save` writes it again; None: plain weights."""
    if weights is None:
        vars(model).pop(_KEY, None)
    else:
        vars(model)[_KEY] = weights


def remembered(model: nn.Module) -> str | None:
    """What `remember` was told of the model, or of that which it is a copy of."""
    kind: str | None = vars(model).get(_KEY)
    return kind


_KEY = "_prunekern_stored"
