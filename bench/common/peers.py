"""Who compact_linear is measured against: a dense linear layer y = x W^T + b in fp32 on the CPU.

Each peer takes (weight [N, K], bias [N] or None, M) and returns a function x [M, K] -> y [M, N]. Packing happens
outside the timed function: all of them are given the same chance to prepare a weight that does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern.ops import compact_linear, pack_weight

Linear = Callable[[Tensor], Tensor]


def prunekern(weight: Tensor, bias: Tensor | None, m: int) -> Linear:
    """compact_linear on a packed weight, no index: the plain matrix product."""
    packed, n = pack_weight(weight), weight.shape[0]
    return lambda x: compact_linear(x, packed, bias, None, None, n)


def f_linear(weight: Tensor, bias: Tensor | None, m: int) -> Linear:
    """What an eager model calls."""
    return lambda x: F.linear(x, weight, bias)


def mkl(weight: Tensor, bias: Tensor | None, m: int) -> Linear:
    """MKL with a prepacked weight: what torch.compile's freezing picks for fp32."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, m)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, bias, m)


def onednn(weight: Tensor, bias: Tensor | None, m: int) -> Linear:
    """oneDNN with a prepacked weight."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, m)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


OURS = "prunekern"
PEERS: dict[str, Callable[[Tensor, Tensor | None, int], Linear]] = {
    OURS: prunekern,
    "F.linear": f_linear,
    "MKL prepacked": mkl,
    "oneDNN prepacked": onednn,
}
