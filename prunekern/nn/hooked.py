"""Whether modules may be computed without calling them."""

from __future__ import annotations

from torch import nn


def is_hooked(*layers: nn.Module) -> bool:
    """Whether someone listens to one of these modules, or put another forward in its place (accelerate does): then
    they must be called, each by itself.
    """
    for layer in layers:  # any() would cost a generator
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__:
            return True
    return False
