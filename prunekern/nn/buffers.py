"""The order of a module's buffers."""

from __future__ import annotations

from torch import nn


def nones_last(module: nn.Module) -> None:
    """Buffers that are None come after those that are there: torch.export counts both, and finds fewer inputs than that
    for a module exported by itself (torch 2.13).
    """
    buffers = module._buffers
    for name in [name for name, buffer in buffers.items() if buffer is None]:
        buffers[name] = buffers.pop(name)
