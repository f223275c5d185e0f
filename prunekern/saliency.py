"""First-order saliency of channel groups, gathered while all masks are on, and the logits that start from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .families import Table
from .nn import ChannelMask

LIMIT = 3.0  # standard deviations: no group is so dear or so cheap that training could not turn it


class Saliency:
    """Squared gradients of the mask values, summed over optimiser steps into the masks' `saliency` buffers.

    A group's mask value m_b multiplies its channels, so that dL/dm_b is, to first order, what the loss loses with
    the group (Molchanov et al. 2017); its mean over steps vanishes as the magnitudes are trained too, its square does
    not. The gradient of a whole optimiser step is squared: micro-batches are summed first, ranks averaged, so that a
    plan does not depend on how a batch was dealt out.
    """

    def __init__(self, masks: Mapping[str, ChannelMask]):
        self.masks = masks
        self._seen: dict[str, Tensor] = {}
        self._hooks = [
            mask.logits.register_post_accumulate_grad_hook(lambda p, name=name: self._see(name, p))
            for name, mask in masks.items()
        ]
        for mask in masks.values():
            mask.is_open = True

    def _see(self, name: str, logits: Tensor) -> None:
        # A copy: trainers zero gradients before they say that a step is over.
        self._seen[name] = logits.grad.detach().float().clone()

    @torch.no_grad()
    def observe(self) -> None:
        """After an optimiser step: add the square of its gradient, over its mean, so that steps and loss scales count
        alike. A step whose gradient is not finite (fp16) is left out.
        """
        if self._seen:
            flat = torch.cat([self._seen.get(n, torch.zeros_like(m.logits)) for n, m in self.masks.items()])
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(flat)
            square = flat.square()
            mean = square.mean()
            if torch.isfinite(mean) and mean > 0:
                sizes = [m.logits.numel() for m in self.masks.values()]
                for mask, part in zip(self.masks.values(), (square / mean).split(sizes), strict=True):
                    mask.saliency += part
        self._seen = {}

    def close(self) -> None:
        """No more: hooks are gone, masks as they were."""
        for hook in self._hooks:
            hook.remove()
        for mask in self.masks.values():
            mask.is_open = False


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
