"""What share a masked model is to lose in the end: so that compacting it before says what is missing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from .. import families
from .plan import Plan, masks_of


@dataclass(frozen=True)
class Asked:
    """Share of `cost` to remove, kept channels in multiples of `align`: as in `PruneConfig`."""

    sparsity: float
    cost: str
    align: int


# By attached model: masks themselves know no share.
asked_of: WeakKeyDictionary[nn.Module, Asked] = WeakKeyDictionary()


def warn_if_short(model: nn.Module, plan: Plan) -> None:
    """Warn where masks that are not final remove less than was asked for, by more than one alignment step."""
    asked, masks = asked_of.get(model), masks_of(model)
    if asked is None or all(mask.is_final for mask in masks.values()):
        return
    table = families.of(model).table(model)
    dense, removed = table.cost({}, asked.cost), plan.sparsity(asked.cost)
    step = 0.0
    for carrier in masks:
        kept = np.ones(table.groups[carrier].count)
        kept[: asked.align] = 0.0
        step = max(step, 1.0 - table.cost({carrier: kept}, asked.cost) / dense)
    if removed < asked.sparsity - step:
        warnings.warn(
            f"compact: the masks are not final, and remove {removed:.4g} of the block {asked.cost} where "
            f"{asked.sparsity:.4g} was asked for; pruner.finalize() makes them final, at that share",
            stacklevel=4,  # past torch's decorator
        )
