"""Timing on a GPU: events around calls on inputs that take turns, so that nobody finds theirs in the L2 cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch


def sets_for(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs together are three times the L2 cache, at least 2 and at most 16."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(16, max(2, -(-3 * l2 // max(1, bytes_of_one))))


def median_seconds(
    calls: dict[str, Sequence[Callable[[], object]]], device: torch.device, seconds: float = 0.4
) -> dict[str, float]:
    """Median time of a call of each name, in turn with the others. calls: name -> the same call on sets of inputs.

    Launches are queued without waiting in rounds of eight, so that the GPU and not Python is timed where it is slower.
    """
    turns = {name: itertools.cycle(some) for name, some in calls.items()}
    for name in calls:  # compilation, handles, caches
        for _ in range(3):
            next(turns[name])()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or any(len(s) < 5 for s in samples.values()):
        for name in calls:
            samples[name].append(_round(turns[name], device))
    return {name: sorted(s)[len(s) // 2] for name, s in samples.items()}


def _round(turn, device: torch.device, count: int = 8) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        next(turn)()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(count):
        next(turn)()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the peak of a call over what was allocated before it; 0 without a GPU."""
    call()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, size: int = 2**30, side: int = 8192) -> dict[str, float]:
    """Bytes a second of a device-to-device copy (read + written), operations a second of a bf16 product."""
    a = torch.randn(size // 4, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(side, side, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
            for _ in range(2))  # fmt: skip
    found = median_seconds({"copy": [lambda: b.copy_(a)], "product": [lambda: x @ y]}, device)
    return {"copy_bytes": 2 * size / found["copy"], "product_flops": 2 * side**3 / found["product"]}
