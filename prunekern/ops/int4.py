"""int4 weights: groups of 32 consecutive inputs of a channel, each with one fp16 scale; 4.5 bits a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

GROUP = 32  # inputs
_HALF = GROUP // 2
# What the weight that is largest in size may become, in steps (csrc/ops/int4.cpp says why these).
STEPS = (-8.5, -8.0, -7.0, -6.0)
LEAST_STEPS = 6.0
_MOST = 65504 * LEAST_STEPS  # else fp16 does not hold the scale
_CHUNK = 2**17  # weights at a time: they stay in the caches


def groups_of(k: int) -> int:
    """Groups of a channel of k inputs; the last one is filled up with zeros."""
    return -(-k // GROUP)


def quantize_weight_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K], any float dtype -> (codes [N, 16 G] uint8, scale [N, G] float16), G = ceil(K / 32).

    Byte i of a group holds input i in its lower four bits and input 16 + i in its upper ones, as q + 8 with q in -8 to
    7; the weight is close to q * scale. The scale is the one that loses least of four for which the weight that is
    largest in size becomes -8.5 to -6 steps, then fitted to the q it gives. 21.8 dB for normal weights, where the
    largest / 7 gives 20.3 and the largest / -8 gives 21.3. Weights that are rounded so already stay as they are, unless
    they are below 4e-4 in size; a group with nothing above 2e-7 counts as zeros.

    Raises ValueError for a weight that holds infinities, NaN, or numbers above 393,000, whose scale fp16 cannot hold.
    """
    checks.tensors("quantize_weight_int4", {"weight": weight}, {})
    checks.shape("quantize_weight_int4", "weight", weight, (None, None))
    checks.floating("quantize_weight_int4", "weight", weight)
    weight = weight.detach()
    n, k = weight.shape
    codes = weight.new_empty((n, _HALF * groups_of(k)), dtype=torch.uint8)
    scale = weight.new_empty((n, groups_of(k)), dtype=torch.float16)
    if codes.is_meta or not weight.numel():
        return codes, scale
    most = weight.abs().amax(1)  # [N]; NaN where a weight is
    if not bool((most <= _MOST).all()):
        channel = int((~(most <= _MOST)).nonzero()[0])
        raise ValueError(
            f"quantize_weight_int4: weight must be finite and at most {_MOST:.0f} in size (got {float(most[channel])} "
            f"in row {channel})"
        )
    rows = max(_CHUNK // k, 1)
    for first in range(0, n, rows):
        part = weight[first : first + rows].float()
        padded = part.new_zeros(part.shape[0], GROUP * groups_of(k))
        padded[:, :k] = part
        q, steps = round_groups(padded.view(-1, GROUP))
        byte = (q + 8).to(torch.uint8)
        codes[first : first + rows] = (byte[:, :_HALF] | byte[:, _HALF:] << 4).view(part.shape[0], -1)
        scale[first : first + rows] = steps.view(part.shape[0], -1)
    return codes, scale


def dequantize_weight_int4(codes: Tensor, scale: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes [N, 16 G] and scale [N, G] of `quantize_weight_int4` -> the weight [N, k] in `dtype`; exact in float32."""
    n, groups = scale.shape
    byte = codes.reshape(n, groups, _HALF)
    q = torch.cat((byte & 15, byte >> 4), -1).to(dtype).sub_(8)  # [N, G, 32]
    return q.mul_(scale.to(dtype)[:, :, None]).reshape(n, GROUP * groups)[:, :k]


def round_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups [M, at most 32] float32, a group a row -> q of the same shape, float32, and scales [M] float16.

    What `quantize_weight_int4` does; the q that is largest in size is 6, 7 or 8, or they are all 0.
    """
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # [M, 1]
    scale, least = largest, groups.new_full((groups.shape[0], 1), float("inf"))
    for steps in STEPS:
        one = (largest / steps).half().float()
        lost = (groups - _rounded(groups, one) * one).square_().sum(1, keepdim=True)
        scale, least = torch.where(lost < least, one, scale), torch.minimum(lost, least)
    q = _rounded(groups, scale)
    square = q.square().sum(1, keepdim=True)
    fitted = torch.where(square > 0, (groups * q).sum(1, keepdim=True) / square, 0.0).half().float()
    stays = _rounded(largest, fitted).abs() >= LEAST_STEPS  # NaN and infinities do not
    scale = torch.where(stays & fitted.isfinite(), fitted, scale)
    return _rounded(groups, scale), scale[:, 0].half()


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale != 0, groups / scale, 0.0).round_().clamp_(-8, 7)
