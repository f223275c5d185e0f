"""What the baseline rule "uniform" ranks channel groups by."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..families import Table
from ..nn import ChannelMask, MaskedDoRALinear
from .budget import Scores

CRITERIA = ("random", "magnitude", "saliency")


def check_criterion(masks: Mapping[str, ChannelMask], criterion: str | Scores) -> None:
    """ValueError unless `criterion` is one of CRITERIA, or has a score for every group of these masks."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"finalize: criterion must be one of {CRITERIA}, or scores (got {criterion!r})")
        return
    for carrier, mask in masks.items():
        shape = np.shape(criterion[carrier]) if carrier in criterion else None
        if shape != (mask.logits.numel(),):
            raise ValueError(
                f"finalize: criterion must have {mask.logits.numel()} scores for {carrier!r} (got "
                f"{'none' if shape is None else list(shape)})"
            )


def criterion_scores(
    layers: Mapping[str, MaskedDoRALinear],
    masks: Mapping[str, ChannelMask],
    table: Table,
    criterion: str | Scores,
    seed: int,
) -> dict[str, np.ndarray]:
    """float64 [groups] by carrier; the lowest go first. seed: of criterion "random".

    ValueError for saliency that was never gathered.
    """
    if not isinstance(criterion, str):
        return {c: np.asarray(criterion[c], dtype=float) for c in masks}
    if criterion == "saliency":
        if not any(bool(m.saliency.any()) for m in masks.values()):
            raise ValueError("finalize: criterion 'saliency' needs warm steps; none were taken")
        return {c: m.saliency.double().cpu().numpy() for c, m in masks.items()}
    if criterion == "random":
        rng = np.random.default_rng(seed)
        return {c: rng.random(m.logits.numel()) for c, m in masks.items()}
    scores = {}
    for carrier in masks:
        magnitude = layers[carrier].magnitude.detach().double().cpu()
        scores[carrier] = magnitude[table.groups[carrier].rows].square().sum(1).sqrt().numpy()
    return scores
