"""What a layer's products lose, where weights, and rows of x, are rounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import CompactLinear
from ..ops.quantized import quantize_rows
from .choosing import WIDE
from .compensated import Int4
from .listening import Listener

MOST_DB = 120.0  # of a row: fp32 itself has about that
BLOCK = 1 << 22  # numbers of a layer's inputs or outputs in memory at once, a few times over


class Loss(Listener):
    """The sums of one layer. compensated: its weight as it is held in int4, where that is not plain rounding."""

    def __init__(self, name: str, module: nn.Module, kinds: Sequence[str], activations: str, most_rows: int,
                 compensated: Int4 | None = None):  # fmt: skip
        super().__init__(name, module, most_rows)
        self.activations, self.compensated = activations, compensated
        self.sums = dict.fromkeys(kinds, 0.0)  # of dB, over rows

    def db(self, kind: str) -> float:
        """Signal to noise; infinite of a kind that was not asked for, and where nothing was computed."""
        return self.sums[kind] / self.rows if self.rows and kind in self.sums else math.inf

    def see(self, x: Tensor) -> None:
        """See `Listener`."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        for kind in self.sums:
            self.sums[kind] += float(decibels(x, weight, self.rounded(kind), kind, self.activations).sum())

    def rounded(self, kind: str) -> Tensor:
        """The weight [N, K] as it is held in a kind, in fp32."""
        kind = "int8" if kind == WIDE else kind
        if kind == "int4" and self.compensated is not None:
            return self.compensated.weight()
        return rounded(self.module.weight.detach(), kind)  # type: ignore[operator]

    def products(self, x: Tensor) -> Mapping[str, Tensor]:
        """By kind, and in fp32, x [rows, K] times the weight: [rows, N]."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        found = {kind: F.linear(rounded_rows(x, kind, self.activations), self.rounded(kind)) for kind in self.sums}
        return found | {"fp32": F.linear(x, weight)}


def decibels(x: Tensor, weight: Tensor, near: Tensor, kind: str, activations: str) -> Tensor:
    """Signal to noise of every row of x [rows, K] times weight [N, K], where it is `near`, held in a kind: [rows]
    float64 in dB; a row of zeros has the most. Without the bias, which loses nothing: a large one would hide what is
    lost.
    """
    found = []
    for block in x.split(max(1, BLOCK // max(weight.shape))):
        y = F.linear(block, weight)
        signal = y.square().sum(1).double()
        noise = F.linear(rounded_rows(block, kind, activations), near).sub_(y).square().sum(1).double()
        found.append((signal / noise).nan_to_num(math.inf).log10().mul(10.0).clamp(-MOST_DB, MOST_DB))
    return torch.cat(found)


def rounded(weight: Tensor, kind: str) -> Tensor:
    """A weight [N, K] as it is held in a kind, in fp32."""
    return CompactLinear(weight, weights=kind).plain_weight().detach().float()


def rounded_rows(x: Tensor, kind: str, activations: str) -> Tensor:
    """x [rows, K] as it is multiplied with weights of a kind, in fp32."""
    if activations == "float" or kind == WIDE:
        return x
    if kind == "bf16":
        return x.bfloat16().float()
    q, scale = quantize_rows(x)
    return q.float() * scale
