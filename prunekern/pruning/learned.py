"""Whether masks have learned anything: what they remove would otherwise be chosen by ties, without a word."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set

import numpy as np

from ..nn import ChannelMask
from .budget import Scores


def refuse_nothing_gathered(who: str, masks: Mapping[str, ChannelMask], reached: Set[str], steps: int) -> None:
    """RuntimeError where the warm steps have gathered nothing, for all masks or for some: logits that start from that
    would be flat, or lowest where no gradient came.

    reached: carriers whose probe has got a gradient; empty where it is not known.
    """
    empty = [c for c, mask in masks.items() if not mask.saliency.is_meta and not bool(mask.saliency.any())]
    if len(empty) < len(masks):
        empty = [c for c in empty if reached and c not in reached]  # a gradient of zero says what a group is worth
    if not empty:
        return
    if any(not masks[carrier].training for carrier in empty):
        why = "they are in eval mode, as from_pretrained leaves a model: call model.train() before the first step"
    elif reached.isdisjoint(empty):
        why = (
            "no gradient has reached them: the loss must be computed from this model, with gradients on, and by every "
            "layer that PruneConfig's targets name"
        )
    else:
        why = "every gradient was zero or not finite"
    raise RuntimeError(
        f"{who}: after {steps} warm steps {len(empty)} of {len(masks)} masks have gathered no saliency "
        f"({empty[0]!r}{', ...' if len(empty) > 1 else ''}): {why}"
    )


def refuse_flat(
    who: str, masks: Mapping[str, ChannelMask], logits: Scores, reached: Set[int], steps: int | None
) -> None:
    """RuntimeError where the logits are all alike after a training loop that no gradient of theirs was part of.

    reached: ids of parameters that have got a gradient. steps: of the optimiser; None where there was none. Logits that
    are alike at the start are what `finalize` is free to work on, and warns of.
    """
    flat = np.concatenate(list(logits.values()))
    if (flat != flat[0]).any() or steps is None:
        return
    if not steps:
        warnings.warn(f"{who}: nothing was trained: all logits are alike, ties decide which go", stacklevel=4)
    elif not any(id(mask.logits) in reached for mask in masks.values()):
        why = "" if any(m.training for m in masks.values()) else " (they are in eval mode: call model.train())"
        raise RuntimeError(f"{who}: no gradient has reached the masks in {steps} steps{why}")
