"""Version counters that optimisers leave as they are.

Packed weights and cached norms are told from stale ones by PyTorch's counters of in-place changes. Fused optimisers
(`fused=True`, transformers' default), and those of other packages with kernels of their own, write past them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook


def _count(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """After every step of any optimiser: what had a gradient counts as changed."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and not parameter.is_inference():
                increment_version(parameter)


register_optimizer_step_post_hook(_count)
