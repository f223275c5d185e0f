"""First-order saliency of channel groups, gathered while all masks are on, and the logits that start from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..families import Table
from ..nn import ChannelMask
from .config import PruneConfig

LIMIT = 3.0  # standard deviations: no group is so dear or so cheap that training could not turn it


class Saliency:
    """Squared losses of channel groups by token, summed over optimiser steps into the masks' `saliency` buffers.

    dy * y at one token is, to first order, what the loss loses with that token's channel (Molchanov et al. 2017). Its
    mean vanishes as the magnitudes are trained too; its square, summed over tokens, is the diagonal of the empirical
    Fisher information (Theis et al. 2018, by image). Squares of a whole step's gradient, where tokens of a batch
    cancel, choose worse (docs/learning-to-prune.md). Sums over tokens do not depend on how a batch was dealt out to
    micro-batches and ranks.
    """

    def __init__(self, masks: Mapping[str, ChannelMask]):
        self.masks = masks
        self.reached: set[str] = set()  # carriers whose probe has got a gradient
        for mask in masks.values():
            mask.open(True)

    @torch.no_grad()
    def observe(self) -> None:
        """After an optimiser step: add what the probes got, over its mean, so that steps and loss scales count alike.

        A step that is not finite (fp16) is left out.
        """
        self.reached |= {c for c, mask in self.masks.items() if mask.probe is not None and mask.probe.grad is not None}
        probed = [(mask, mask.probe) for mask in self.masks.values() if mask.probe is not None]
        flat = torch.cat([torch.zeros_like(p) if p.grad is None else p.grad for _, p in probed])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        mean = flat.mean()
        if torch.isfinite(mean) and mean > 0:
            parts = (flat / mean).split([probe.numel() for _, probe in probed])
            for (mask, _), part in zip(probed, parts, strict=True):
                mask.saliency += part
        for _, probe in probed:
            probe.grad = None

    def close(self) -> None:
        """No more: masks as they were."""
        for mask in self.masks.values():
            mask.open(False)


def group_cost(table: Table, carrier: str, what: str) -> float:
    """What one group of this carrier costs with all others kept, of "params" or "macs"."""
    kept = {c: np.ones(g.count) for c, g in table.groups.items()}
    kept[carrier][0] = 0.0
    return table.cost({}, what) - table.cost(kept, what)


def starting_logits(
    table: Table, saliency: Mapping[str, np.ndarray], what: str, spread: float
) -> dict[str, np.ndarray]:
    """Logits of mean 0 and standard deviation `spread`: log of saliency a unit of cost, standardised over all groups.

    saliency: non-negative [groups] by carrier. Where it is zero everywhere, the logits are flat.
    """
    per_cost = {c: s / group_cost(table, c, what) for c, s in saliency.items()}
    flat = np.concatenate(list(per_cost.values()))
    if not (flat > 0).any():
        return {c: np.zeros_like(s) for c, s in per_cost.items()}
    least = flat[flat > 0].min()
    logs = {c: np.log(np.maximum(s, least)) for c, s in per_cost.items()}
    flat = np.concatenate(list(logs.values()))
    mean, deviation = flat.mean(), flat.std()
    if deviation == 0:
        return {c: np.zeros_like(s) for c, s in logs.items()}
    return {c: spread * np.clip((s - mean) / deviation, -LIMIT, LIMIT) for c, s in logs.items()}


@torch.no_grad()
def start_from_saliency(masks: Mapping[str, ChannelMask], table: Table, config: PruneConfig) -> None:
    """Logits from what was gathered; flat where nothing was. The threshold is solved for at once."""
    gathered = {carrier: mask.saliency.double().cpu().numpy() for carrier, mask in masks.items()}
    for carrier, values in starting_logits(table, gathered, config.cost, config.spread).items():
        masks[carrier].logits.copy_(torch.from_numpy(values))
