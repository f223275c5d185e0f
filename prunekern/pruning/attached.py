"""What an attached model is like now: its masks, what they keep, the plan they make. Nothing here changes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..compacting.plan import Plan, from_kept, masks_of
from ..families import Table
from ..nn import ChannelMask, MaskedDoRALinear
from . import budget
from .config import PruneConfig
from .kept import kept_probability, kept_shares, report

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AttachedModel:
    """What a `Pruner` can be asked at any time."""

    def __init__(self, model: PreTrainedModel, config: PruneConfig, table: Table):
        self.model, self.config, self.table = model, config, table
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedDoRALinear)}

    @property
    def masks(self) -> dict[str, ChannelMask]:
        """Channel masks by the module name of their carrier."""
        return masks_of(self.model)

    @property
    def finalized(self) -> bool:
        """Whether the masks are final."""
        return all(mask.is_final for mask in self.masks.values())

    @property
    def shrunk(self) -> bool:
        """Whether the pruned channels are dropped."""
        return any(getattr(layer, "is_shrunk", False) for layer in self.layers.values())

    @torch.no_grad()
    def logits(self) -> dict[str, np.ndarray]:
        """Mask logits as they are now, float64 [groups] by carrier."""
        masks = self.masks
        if not masks:
            return {}
        flat = torch.cat([mask.logits for mask in masks.values()]).double().cpu().numpy()  # one transfer
        sizes = np.cumsum([mask.logits.numel() for mask in masks.values()])[:-1]
        return dict(zip(masks, np.split(flat, sizes), strict=True))

    def expected_sparsity(self) -> float:
        """Share removed in expectation over the mask noise (exact once final), of `config.cost`."""
        return budget.removed_share(self.table, kept_probability(self.masks), self.config.cost)

    def kept_shares(self) -> dict[str, float]:
        """Expected share of groups kept: by kind of group ("ffn"), then by carrier."""
        return kept_shares(self.masks, self.table)

    def sparsity(self) -> float:
        """Share that `compact` would remove with the masks as they are now, of `config.cost`."""
        return self.plan().sparsity(self.config.cost)

    def plan(self) -> Plan:
        """As `prunekern.plan(model)`."""
        return from_kept(self.table, {c: m.kept() for c, m in self.masks.items()})

    def report(self) -> dict[str, Any]:
        """What the masks keep now, as `finalize` returns it."""
        return report(self.masks, self.table, self.config)
