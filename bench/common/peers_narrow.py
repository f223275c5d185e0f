"""Who compact_linear is measured against in 8 and 16 bits: a dense linear layer y = x W^T + b on the CPU.

Each peer takes (weight [N, K] fp32, bias [N], M) and returns (prepare, run): `run(prepare(x))` gives y [M, N] for an
fp32 x [M, K], and only `run` is timed. Where x has to be rounded first, the peer is there twice: with that inside
`run`, which is the work of ours, and with that in `prepare`, for a model that holds it so already. Weights are rounded
and packed outside the timed function, one scale a channel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern.nn import CompactLinear

Pair = tuple[Callable[[Tensor], object], Callable[..., Tensor]]
Make = Callable[[Tensor, Tensor, int], Pair]

OURS, WIDE = "ours", "ours fp32"
GIVEN = "ours bf16 x"


def same(x: Tensor) -> Tensor:
    return x


def ours(weights: str, dtype: torch.dtype = torch.float32) -> Make:
    """A compact layer that keeps everything; x in `dtype`, rounded further where that is faster on this CPU."""

    def make(weight: Tensor, bias: Tensor, m: int) -> Pair:
        layer = CompactLinear(weight, bias, weights=weights, activations="auto").eval()
        layer.pack()
        return (lambda x: x.to(dtype)), layer

    return make


def dynamic(engine: str) -> Make:
    """What `quantize_dynamic` puts in the place of nn.Linear: x by tensor to 8 bits. Of 8 bits all are used: with
    `reduce_range`, its default, it is no faster and loses 4 dB.
    """

    def make(weight: Tensor, bias: Tensor, m: int) -> Pair:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.ao's end
            held = torch.quantize_per_channel(
                weight, scales_of(weight).double(), torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8
            )
            packed = torch.ops.quantized.linear_prepack(held, bias)
        torch.backends.quantized.engine = before
        return same, lambda x: torch.ops.quantized.linear_dynamic(x, packed)

    return make


def qlinear(included: bool) -> Make:
    """oneDNN's int8 product as torch.compile calls it; x by tensor to 8 bits, in `run` if `included`."""

    def make(weight: Tensor, bias: Tensor, m: int) -> Pair:
        scale, zero = scales_of(weight), torch.zeros(len(weight), dtype=torch.int64)
        held = (weight / scale[:, None]).round_().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(held, [m, weight.shape[1]])

        def quantised(x: Tensor) -> tuple[Tensor, float, int]:
            y = torch.quantize_per_tensor_dynamic(x, torch.quint8, False)
            return y.int_repr(), y.q_scale(), y.q_zero_point()

        def run(x: tuple[Tensor, float, int]) -> Tensor:
            rest = (bias, 1.0, 0, torch.float32, "none", [], "")
            return torch.ops.onednn.qlinear_pointwise(*x, packed, scale, zero, *rest)

        return (same, lambda x: run(quantised(x))) if included else (quantised, run)

    return make


def bf16(included: bool) -> Make:
    """F.linear of bf16 tensors; x fp32 and y fp32 if `included`."""

    def make(weight: Tensor, bias: Tensor, m: int) -> Pair:
        w, b = weight.bfloat16(), bias.bfloat16()
        if included:
            return same, lambda x: F.linear(x.bfloat16(), w, b).float()
        return Tensor.bfloat16, lambda x: F.linear(x, w, b)

    return make


def onednn_bf16(weight: Tensor, bias: Tensor, m: int) -> Pair:
    """oneDNN with a prepacked bf16 weight: what torch.compile's freezing picks. x in bf16."""
    b, packed = bias.bfloat16(), torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), m)
    return Tensor.bfloat16, lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, b, "none", [], "")


def scales_of(weight: Tensor) -> Tensor:
    """[N] of the largest weight of each channel in 127 steps."""
    return weight.abs().amax(1) / 127


# By arithmetic. "bf16 x", "int8 x": x is rounded already.
PEERS: dict[str, dict[str, Make]] = {
    "bf16": {
        OURS: ours("bf16"),
        GIVEN: ours("bf16", torch.bfloat16),
        WIDE: ours("fp32"),
        "F.linear": bf16(included=True),
        "F.linear bf16 x": bf16(included=False),
        "oneDNN bf16 x": onednn_bf16,
    },
    "int8": {
        OURS: ours("int8"),
        WIDE: ours("fp32"),
        "dynamic x86": dynamic("x86"),
        "dynamic onednn": dynamic("onednn"),
        "qlinear": qlinear(included=True),
        "qlinear int8 x": qlinear(included=False),
    },
}
