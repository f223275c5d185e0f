"""How final masks are chosen: one function for each rule of `Pruner.finalize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..families import Table
from ..nn import ChannelMask
from . import budget, whole_heads
from .config import PruneConfig
from .criteria import check_criterion

RULES = ("learned", "uniform", "stock", "heads")


def check_rule(
    rule: str,
    criterion: str | budget.Scores,
    masks: Mapping[str, ChannelMask],
    table: Table,
    config: PruneConfig,
    head_counts: Sequence[int],
) -> None:
    """ValueError for a rule or criterion that is none, and for a sparsity that the rule cannot reach."""
    if rule not in RULES:
        raise ValueError(f"finalize: rule must be one of {RULES} (got {rule!r})")
    if rule == "uniform":
        check_criterion(masks, criterion)
    elif rule in ("stock", "heads"):
        groups = {carrier: mask.logits.numel() for carrier, mask in masks.items()}
        whole_heads.check_reachable(table, groups, config, head_counts, rule)


def choose(
    rule: str, scores: budget.Scores, table: Table, config: PruneConfig, head_counts: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(groups to keep, bool by carrier; what the report says besides). scores: the lowest go.

    ValueError for scores that are not finite.
    """
    bad = [carrier for carrier, values in scores.items() if not np.isfinite(values).all()]
    if bad:
        raise ValueError(f"finalize: scores of {bad[0]!r} are not finite; the masks are left as they were")
    if rule in ("stock", "heads"):
        kept, found = whole_heads.choose(table, scores, config, head_counts, rule)
        return kept, {name: found[name] for name in ("kept_score", "given_up")}
    select = budget.select_global if rule == "learned" else budget.select_uniform
    return select(table, scores, config.sparsity, config.cost, config.align), {}
