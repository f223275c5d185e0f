"""What a call of compact_mlp must be like: shapes, dtypes, devices; errors name the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .activations import ACTIVATIONS
from .packing import check_scale, is_packed, plain_shape
from .quantized import check_activations

OP = "compact_mlp"


def check_shapes(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    gate_bias: Tensor | None, up_scale: Tensor | None, down_scale: Tensor | None, gate_scale: Tensor | None,
    in_index: Tensor | None, out_index: Tensor | None, n_hidden: int, n_out: int, activation: str,
    residual: Tensor | None, activations: str = "auto",
) -> None:  # fmt: skip
    """All that can be told without reading an index."""
    checks.activation(OP, activation, ACTIVATIONS)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must have at least 1 dimension (got a scalar)")
    checks.floating(OP, "x", x)
    weights, biases = by_layer(up, down, gate), by_layer(up_bias, down_bias, gate_bias, "_bias")
    check_activations(OP, activations, x, {name: w for name, w in weights.items() if w is not None}, False)
    scales = by_layer(up_scale, down_scale, gate_scale, "_scale")
    checks.dtypes(OP, x, weights, biases, residual)
    others = {"in_index": in_index, "out_index": out_index, "residual": residual}
    checks.same_device(OP, "x", x.device, **weights, **biases, **others)
    k = x.shape[-1] if in_index is None else in_index.numel()
    n = n_out if out_index is None else out_index.numel()
    for name, weight in weights.items():
        if weight is None:
            if biases[name + "_bias"] is not None or scales[name + "_scale"] is not None:
                raise ValueError(f"{OP}: {name}_bias and {name}_scale go with a {name} (got None)")
            continue
        shape = (n, n_hidden) if name == "down" else (n_hidden, k)
        if is_packed(weight) != is_packed(up):
            raise ValueError(f"{OP}: {name} must be {'packed' if is_packed(up) else 'plain'} like up")
        if not is_packed(weight):
            checks.shape(OP, name, weight, plain_shape(*shape, weight.dtype))
        bias = biases[name + "_bias"]
        if bias is not None:
            checks.shape(OP, name + "_bias", bias, (shape[0],))
        check_scale(OP, name + "_scale", weight, shape[0], scales[name + "_scale"])
    for name, index, size in (("in_index", in_index, x.shape[-1]), ("out_index", out_index, n_out)):
        if index is not None and (index.dtype != torch.int64 or index.dim() != 1 or index.numel() > size):
            raise (TypeError if index.dtype != torch.int64 else ValueError)(
                f"{OP}: {name} must be 1-D int64 of at most {size} channels (got {list(index.shape)} {index.dtype})"
            )
    if residual is not None:
        checks.shape(OP, "residual", residual, (*x.shape[:-1], n_out))


def by_layer(up: Tensor | None, down: Tensor | None, gate: Tensor | None, suffix: str = "") -> dict[str, Tensor | None]:
    """What belongs to the three layers, by the names of the arguments."""
    return {"up" + suffix: up, "down" + suffix: down, "gate" + suffix: gate}
