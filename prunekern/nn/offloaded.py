"""Codes that offload has lost: accelerate keeps the plain weight of `state_dict()`, and casts it to int8 to use it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def check_codes(layer: nn.Module) -> None:
    """ValueError where hooks of accelerate put a floating-point weight, cast to whole numbers, in place of int8 or int4
    values: what would be computed has nothing to do with the weights.

    layer: with a parameter `weight`. Files in few bits that are loaded with a device_map keep their codes.
    """
    hook: Any = layer.__dict__.get("_hf_hook")
    if hook is None or layer.get_parameter("weight").is_floating_point():
        return
    for each in getattr(hook, "hooks", (hook,)):
        kept = getattr(each, "weights_map", None)
        value = None if kept is None or not getattr(each, "offload", False) else kept["weight"]
        if isinstance(value, Tensor) and value.is_floating_point():
            raise ValueError(
                "CompactLinear: weights must be fp32 or bf16 where accelerate offloads them (got int8): it would cast "
                "them to whole numbers. Load the model with weights='fp32' or 'bf16'"
            )
