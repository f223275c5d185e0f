"""Which layers are held in more bits than the rest: what `calibrate` chose, as it stands in a compact model's
config."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..ops.packing import WEIGHTS
from ..ops.quantized import ACTIVATIONS_OF_X, TAKE_INT8

if TYPE_CHECKING:
    from .plan import Plan

_FIELDS = ("weights", "activations", "least_db", "layers", "head", "plan")
_FLOAT = "float_x"  # stands there only where it holds a name; files of before have none
HEAD = "head"  # in float_x


def more_careful(one: str, other: str) -> str:
    """Of two kinds of weights the one with more bits."""
    return min(one, other, key=WEIGHTS.index)


@dataclass(frozen=True)
class Held:
    """What was asked for, and the layers that lost too much in it.

    weights, activations, least_db: as `calibrate` was given them. layers: by name in the plan, the kind that a layer is
    held in where that is not `weights`; head: of the head of a causal language model. plan: `digest` of the plan of the
    model that was measured. float_x: the layers, and "head", whose x is not rounded, whatever is asked for.
    """

    weights: str
    activations: str
    least_db: float
    layers: Mapping[str, str]
    head: str
    plan: str
    float_x: Sequence[str] = ()

    def kind(self, name: str, asked: str) -> str:
        """What the layer `name` is held in where `asked` is asked for: the more careful of that and what stands here.

        So a file calibrated for int8 is all fp32 where fp32 is asked for.
        """
        return more_careful(asked, self.layers.get(name, asked))

    def head_kind(self, asked: str) -> str:
        """As `kind`, of the head."""
        return asked if self.head == self.weights else more_careful(asked, self.head)

    def x(self, name: str, kind: str, asked: str) -> str:
        """What becomes of what the layer `name` reads, or "head", held in `kind`, where activations `asked` are asked
        for.
        """
        return "float" if name in self.float_x and kind in TAKE_INT8 else asked

    def renamed(self, rename: Callable[[str], str]) -> Held:
        """The same for a model whose layers are called otherwise."""
        layers = {rename(name): kind for name, kind in self.layers.items()}
        float_x = tuple(name if name == HEAD else rename(name) for name in self.float_x)
        return replace(self, layers=layers, float_x=float_x)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = {name: getattr(self, name) for name in _FIELDS} | {"layers": dict(self.layers)}
        return data | {_FLOAT: list(self.float_x)} if self.float_x else data

    @classmethod
    def from_dict(cls, data: Any, plan: Plan) -> Held:
        """The inverse of `to_dict`. ValueError names what is wrong with it, or the layer that `plan` does not have."""
        known = isinstance(data, Mapping) and set(data) - {_FLOAT} == set(_FIELDS)
        if not known or not isinstance(data["layers"], Mapping):
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"held: must be a mapping with {', '.join(_FIELDS)} (got {got})")
        kinds = {"weights": data["weights"], "head": data["head"]}
        kinds |= {f"layer {name!r}": kind for name, kind in data["layers"].items()}
        for what, kind in kinds.items():
            if kind not in WEIGHTS:
                raise ValueError(f"held: {what} must be one of {', '.join(WEIGHTS)} (got {kind!r})")
        if data["activations"] not in ACTIVATIONS_OF_X:
            accepted = ", ".join(ACTIVATIONS_OF_X)
            raise ValueError(f"held: activations must be one of {accepted} (got {data['activations']!r})")
        float_x = data.get(_FLOAT, [])
        if not isinstance(float_x, (list, tuple)) or not all(isinstance(name, str) for name in float_x):
            raise ValueError(f"held: {_FLOAT} must be a list of names (got {float_x!r})")
        least = data["least_db"]
        if isinstance(least, bool) or not isinstance(least, (int, float)) or not math.isfinite(least):
            raise ValueError(f"held: least_db must be a finite number (got {least!r})")
        for name in (*data["layers"], *float_x):
            if name not in plan.layers and not (name == HEAD and name in float_x):
                raise ValueError(f"held: layer {name!r} is not in the plan; the choice is that of another model")
        if data["plan"] != digest(plan):
            raise ValueError(
                f"held: plan must be {digest(plan)!r}, the digest of the plan beside it (got {data['plan']!r}): other "
                "channels were kept where the choice was made; calibrate this model"
            )
        return cls(**dict(data) | {"layers": dict(data["layers"]), _FLOAT: tuple(float_x)})


def digest(plan: Plan) -> str:
    """Tells plans apart: 16 hexadecimal digits of what is kept of every layer, whatever prefix the names have."""
    layers: dict[str, Any] = plan.to_dict()["layers"]
    text = json.dumps([layers[name] for name in sorted(layers)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
