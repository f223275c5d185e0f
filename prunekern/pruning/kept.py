"""What the masks keep now: in expectation while they are drawn, exactly once they are final."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..compacting.plan import from_kept
from ..families import Table
from ..nn import ChannelMask
from . import budget
from .config import PruneConfig


def kept_probability(masks: Mapping[str, ChannelMask]) -> dict[str, np.ndarray]:
    """float64 [groups] by carrier: the probability of each group to be kept at the next draw (0 or 1 once final)."""
    kept = {}
    for carrier, mask in masks.items():
        shifted = (mask.logits - mask.threshold).detach().double().cpu().numpy()
        if mask.is_open:
            kept[carrier] = np.ones_like(shifted)
        else:
            kept[carrier] = (shifted > 0).astype(float) if mask.is_final else budget.sigmoid(shifted)
    return kept


def kept_shares(masks: Mapping[str, ChannelMask], table: Table) -> dict[str, float]:
    """Expected share of groups kept: by kind of group ("ffn"), then by carrier."""
    by_carrier = kept_probability(masks)
    by_kind: dict[str, list[np.ndarray]] = defaultdict(list)
    for carrier, kept in by_carrier.items():
        by_kind[table.groups[carrier].kind].append(kept)
    shares = {kind: float(np.concatenate(kept).mean()) for kind, kept in by_kind.items()}
    return shares | {carrier: float(kept.mean()) for carrier, kept in by_carrier.items()}


def report(masks: Mapping[str, ChannelMask], table: Table, config: PruneConfig) -> dict[str, Any]:
    """{"sparsity", "target", "cost", "kept": {carrier: [kept, of]}, "by_kind": {kind: [kept, of]}}, by what
    `compact` would remove now.
    """
    kept = {carrier: mask.kept() for carrier, mask in masks.items()}
    settled = table.settle(kept)
    return {
        "sparsity": from_kept(table, kept).sparsity(config.cost),
        "target": config.sparsity,
        "cost": config.cost,
        "kept": {carrier: [int(alive.sum()), alive.numel()] for carrier, alive in settled.items()},
        "by_kind": budget.by_kind(table, settled),
    }
