"""x rounded to int8 by row: what 8-bit arithmetic multiplies, and when it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .int4 import dequantize_weight_int4

# Position: the number the C++ core knows it by.
ACTIVATIONS_OF_X = ("auto", "float", "int8")
OF_X = {name: number for number, name in enumerate(ACTIVATIONS_OF_X)}
MOST_INPUTS = 133_143  # of int8 weights: 127 * 127 * K < 2^31
TAKE_INT8 = ("int8", "int4")  # kinds of weights that are multiplied with x in int8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K], any float dtype -> (q [..., K] int8, scale [..., 1] float32), with x close to q * scale.

    scale is the row's largest |x| / 127; q = x * (127 / largest), rounded to nearest, ties to even. A row with nothing
    above 1e-36 has scale 0 and q 0; one that holds infinities or NaN has scale NaN and q 0.
    """
    x = x.float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_zeros((*x.shape[:-1], 1))
    largest = x.abs().amax(-1, keepdim=True)  # [..., 1]; NaN where a value is NaN
    some = (largest > 1e-36) & largest.isfinite()
    scale = torch.where(some, largest / 127.0, torch.where(largest <= 1e-36, 0.0, float("nan")))
    q = torch.where(some, (x * (127.0 / largest)).round(), 0.0)
    return q.to(torch.int8), scale


def linear_of_rounded(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times an int8 or int4 weight of N channels with its scale, in int8 arithmetic -> [..., N] float32.

    In float64, which holds the sums of int8 exactly.
    """
    q, by_row = quantize_rows(x)
    if weight.dtype == torch.uint8:
        y = (q.double() @ dequantize_weight_int4(weight, scale, q.shape[-1], torch.float64).t()).float() * by_row
    else:
        sums = q.double() @ weight.double().t()  # [..., N]
        y = sums.float() * (by_row * scale)
    return y if bias is None else y + bias.float()


def check_activations(op: str, activations: str, x: Tensor, weights: dict[str, Tensor], needs_grad: bool) -> None:
    """ValueError unless `activations` is known; and where it is int8, unless int8 arithmetic can do it."""
    if activations not in OF_X:
        raise ValueError(f"{op}: activations must be one of {', '.join(ACTIVATIONS_OF_X)} (got {activations!r})")
    if activations != "int8":
        return
    if needs_grad:
        raise ValueError(
            f"{op}: activations must be auto or float where a gradient is needed (got 'int8'): rounding has none. Call "
            "it under torch.no_grad(), or leave activations at 'auto'"
        )
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{op}: activations must be auto or float on {x.device.type} (got 'int8'): 8-bit arithmetic is of CPUs"
        )
    for name, weight in weights.items():
        if weight.dtype == torch.uint8:
            continue
        if weight.dtype != torch.int8:
            raise ValueError(
                f"{op}: activations must be auto or float with a {weight.dtype} weight (got 'int8'): hold {name} in "
                "int8 or int4, as quantize_weight does"
            )
        inputs = weight.shape[1] * (weight.shape[3] if weight.dim() == 4 else 1)
        if inputs > MOST_INPUTS + 15:  # panels pad to 16: the core knows exactly
            raise ValueError(f"{op}: activations int8 go with at most {MOST_INPUTS} inputs (got {inputs})")
