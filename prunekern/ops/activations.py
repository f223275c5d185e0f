"""Activations by our names. Every one maps 0 to 0: a removed channel is exactly zero after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Position: the number the C++ core knows it by.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu")
NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}
QUICK = 1.702  # of quick_gelu, z sigmoid(1.702 z)


def activate(z: Tensor, activation: str) -> Tensor:
    """act(z), by our names."""
    if activation == "relu":
        return F.relu(z)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "quick_gelu":
        return z * torch.sigmoid(QUICK * z)
    return F.silu(z) if activation == "silu" else z


def activate_backward(grad: Tensor, z: Tensor, activation: str) -> Tensor:
    """grad * act'(z)."""
    if activation == "relu":
        return grad * (z > 0)
    if activation == "gelu":
        grad = torch.ops.aten.gelu_backward(grad, z)
    elif activation == "gelu_tanh":
        grad = torch.ops.aten.gelu_backward(grad, z, approximate="tanh")
    elif activation == "silu" and torch.is_grad_enabled():  # aten's has no derivative of its own
        sigmoid = z.sigmoid()
        grad = grad * sigmoid * (1 + z * (1 - sigmoid))
    elif activation == "silu":
        grad = torch.ops.aten.silu_backward(grad, z)
    elif activation == "quick_gelu":
        sigmoid = torch.sigmoid(QUICK * z)
        grad = grad * sigmoid * (1 + QUICK * z * (1 - sigmoid))
    return grad
