"""Answers first, then turns: what every comparison of single ops goes through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Run = Callable[[], object]


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


def race(runs: dict[str, Run], seconds: float, least: int = 5) -> dict[str, float]:
    """Shortest seconds of each, called in turn for about `seconds` each and at least `least` times.

    The order turns round so that nobody always follows the same neighbour.
    """
    best = dict.fromkeys(runs, math.inf)
    order = list(runs)
    end, turn = time.perf_counter() + seconds * len(runs), 0
    while turn < least or time.perf_counter() < end:
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            run = runs[name]
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; nan of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same normal numbers at every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
