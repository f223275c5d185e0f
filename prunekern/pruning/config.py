"""What to adapt, what to prune and how far."""

from __future__ import annotations

import math
import numbers
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from ..families import COSTS

PRESETS = ("full", "paper")


@dataclass(frozen=True)
class PruneConfig:
    """Settings of `attach`. ValueError names the field that does not fit.

    rank, alpha: of the low-rank update; its scale is alpha / rank.
    dropout: on the input of the low-rank branch.
    preset: "full" adapts and prunes every linear of the block; "paper" rank-`rank` adapters on the query and value
        projections only (ASP-DAC 2025); None with `targets`.
    targets: module names, or their last parts ("q_lin"); layers among them that carry a channel group get a mask.
    sparsity: share of the block linears' parameters or multiply-adds to remove, in [0, 1).
    cost: "params" (biases counted) or "macs".
    align: kept channels of each layer come in multiples of this, or all stay; at most the groups of the smallest mask.
    norm_grad: "detached" (row norm constant in the backward pass) or "full".
    seed: of adapter initialisation and mask noise.
    warm_steps: optimiser steps with all masks on, in which saliency is gathered; the logits then start from it. 0: they
        start flat. None: 100, or 0 with preset "paper". Of 250 steps, 30 were worse than 98 by 1.8 points, 60 were
        level; starting flat, by 3.5.
    ramp_steps: optimiser steps, after the warm ones, over which the removed share rises from 0 to `sparsity`.
    spread: standard deviation of the logits as they start from saliency, in units of the mask noise's scale. 1 and 2
        were worse than 4 by 0.4 points, 8 by 0.1: the noise should question saliency, not drown it.
    temperature: of the Gumbel-Sigmoid's soft gradient.

    The figures are of `docs/learning-to-prune.md`: accuracy with half the block parameters removed.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    preset: str | None = "full"
    targets: tuple[str, ...] | list[str] | None = None
    sparsity: float = 0.25
    cost: str = "params"
    align: int = 1
    norm_grad: str = "detached"
    seed: int = 0
    warm_steps: int | None = None
    ramp_steps: int = 30
    spread: float = 4.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        def refuse(name: str, accepted: str) -> NoReturn:
            raise ValueError(f"PruneConfig: {name} must be {accepted} (got {getattr(self, name)!r})")

        def number(name: str, low: float, high: float, accepted: str, kind: Any = numbers.Real) -> None:
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                refuse(name, accepted)
            if type(value) not in (int, float):  # numpy's, which JSON does not take
                object.__setattr__(self, name, int(value) if isinstance(value, numbers.Integral) else float(value))

        if self.warm_steps is None:
            object.__setattr__(self, "warm_steps", 0 if self.preset == "paper" and self.targets is None else 100)
        for name in ("rank", "align"):
            number(name, 1, math.inf, "an integer of at least 1", numbers.Integral)
        for name in ("seed", "warm_steps", "ramp_steps"):
            number(name, 0, math.inf, "a non-negative integer", numbers.Integral)
        number("sparsity", 0, math.nextafter(1.0, 0), "in [0, 1)")
        number("dropout", 0, math.nextafter(1.0, 0), "in [0, 1)")
        number("alpha", math.ulp(0.0), sys.float_info.max, "positive and finite")
        number("spread", 0, sys.float_info.max, "non-negative and finite")
        number("temperature", math.ulp(0.0), sys.float_info.max, "positive and finite")
        if self.cost not in COSTS:
            refuse("cost", f"one of {COSTS}")
        if self.norm_grad not in ("detached", "full"):
            refuse("norm_grad", "'detached' or 'full'")
        if self.preset is not None and self.preset not in PRESETS:
            refuse("preset", f"one of {PRESETS}, or None with targets")
        if self.preset is None and self.targets is None:
            refuse("targets", "a list of module names when preset is None")
        if self.targets is not None:
            listed = isinstance(self.targets, (list, tuple)) and len(self.targets) > 0
            if not listed or not all(isinstance(t, str) for t in self.targets):
                refuse("targets", "a list of module names, or None with a preset")
        if self.targets is not None:
            # Naming targets replaces the preset's choice; both together would leave it unclear which one holds.
            object.__setattr__(self, "preset", None)
            object.__setattr__(self, "targets", tuple(self.targets))

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneConfig:
        """The inverse of `to_dict`. ValueError for a field that is none, or a value that is not accepted."""
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"PruneConfig: unknown field {unknown[0]!r}; accepted: {[f.name for f in fields(cls)]}")
        return cls(**data)
