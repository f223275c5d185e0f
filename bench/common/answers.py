"""Answers first: a figure of a wrong answer is none. Then what figures are made of: numbers in, means out."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Of the largest logit. fp32 came out between 1e-7 and 3e-6 for all peers; a wrong channel shows at 1e-3 and above.
TOLERANCE = 2e-5
# int8 with one scale per channel reaches about 40 dB a layer; a wrong kernel a few dB.
LEAST_DECIBEL = 20.0


def check(name: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """SystemExit unless y is x W^T + b to fp32 rounding of a sum of K + 1 terms."""
    exact = x.double() @ weight.double().T
    size = x.abs().double() @ weight.abs().double().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.abs().double()
    within(name, y, exact, (weight.shape[1] + 1) * 2.0**-24 * size)


def within(name: str, y: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """SystemExit unless |y - exact| <= bound everywhere."""
    excess = (y.double() - exact).abs() - bound
    if y.shape != exact.shape or not bool((excess <= 0).all()):
        raise SystemExit(f"{name}: wrong answer (shape {list(y.shape)}, off by {excess.max():.3g})")


def check_logits(name: str, logits: Tensor, exact: Tensor) -> None:
    """SystemExit unless logits are right to fp32 rounding through all layers."""
    difference = ((logits - exact).abs().max() / exact.abs().max()).item()
    if not difference <= TOLERANCE:
        raise SystemExit(f"{name}: wrong answer (logits differ from float64 by {difference:.1e} of the largest)")


def decibel(logits: Tensor, exact: Tensor) -> float:
    """Signal to quantisation noise of the logits."""
    return (10 * torch.log10(exact.square().sum() / (logits - exact).square().sum())).item()


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; nan of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers at every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
