"""What this machine does at most, and calls timed in turn: interleaved in one process, minima compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from prunekern import _native


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's thread count for the block (the C++ kernels follow it)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float = 3.0,
    least: int = 8,
    *,
    each: bool = False,
    turning: bool = False,
    timed: Callable[[Callable[[], object]], float] | None = None,
    of: Callable[[list[float]], float] = min,
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Fastest time of each call, in seconds: called in turn, at least `least` times and for about `seconds` in all.

    each: `seconds` for every call, not for all of them. turning: every turn begins one call further on, so that nobody
    always follows the same neighbour. timed: makes a call and returns its seconds, where a clock around it would not
    tell them (a GPU's events). of: what counts of a call's times, in place of the fastest. progress: is told after
    every turn what part is done, 0 to 1.
    """

    def by_the_clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    take = by_the_clock if timed is None else timed
    for call in calls.values():
        call()  # allocation, packing and caches are not timed
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, turn, whole = list(calls), 0, seconds * len(calls) if each else seconds
    start = time.perf_counter()
    while turn < least or time.perf_counter() - start < whole:
        first = turn % len(order) if turning else 0
        for name in order[first:] + order[:first]:
            times[name].append(take(calls[name]))
        turn += 1
        if progress is not None:
            of_time = (time.perf_counter() - start) / whole if whole > 0 else 1.0
            progress(min(1.0, of_time, turn / least if least > 0 else 1.0))
    return {name: of(some) for name, some in times.items()}


def peak_gflops(repeats: int = 200, arithmetic: str = "fp32") -> float:
    """What one core does without touching memory, in 10^9 operations a second, a multiply-add being two: its FMA units
    in fp32, or what it has for arithmetic bf16 or int8; 0 where the instruction set in use has nothing of its own for
    that. RuntimeError without the core.
    """
    core = _native.core()
    best, flops = float("inf"), 0
    if core.run_peak(1, arithmetic) == 0:
        return 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        flops = core.run_peak(100_000, arithmetic)
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


def run_peak(flops: int) -> None:
    """As many fp32 operations on one core, in registers only: the least time any kernel needs for them."""
    core = _native.core()
    core.run_peak(max(1, flops // core.run_peak(1)))


def read_bandwidth(size: int = 2**29, repeats: int = 5) -> float:
    """GB/s at which one core reads `size` bytes, larger than any cache. RuntimeError without the core."""
    core = _native.core()
    memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    core.prefer_huge_pages(memory.data_ptr(), size)
    memory.fill_(1)  # pages that nobody wrote are all the same page
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        core.run_read(memory.data_ptr(), size)
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9
