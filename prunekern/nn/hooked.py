"""Whether modules may be computed without calling them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _module

from .compact_linear import CompactLinear

# Hooks of every module there is: profilers of modules and FLOP counters set them.
EVERYWHERE: tuple[dict[Any, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where those who listen to this module alone are kept."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_hooked(*layers: nn.Module) -> bool:
    """Whether someone listens to one of these modules or to all there are, put another forward in its place (accelerate
    does), or computes its weight (parametrisations do): then they must be called, each by itself.
    """
    for hooks in EVERYWHERE:  # any() would cost a generator
        if hooks:
            return True
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return True
        if "forward" in layer.__dict__ or "parametrizations" in layer._modules:
            return True
    return False


def is_replaced(*layers: nn.Module) -> bool:
    """Whether one of these is another module than a CompactLinear: a wrapper around one (PEFT's, torch.compile's), a
    subclass, a layer still in training. Such a one is called as an `nn.Linear` is, with x alone.
    """
    for layer in layers:
        if type(layer) is not CompactLinear:
            return True
    return False
