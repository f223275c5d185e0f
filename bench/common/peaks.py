"""What the multipliers of one core do at most in each arithmetic, as a contestant that touches no memory."""

from __future__ import annotations

import time

from prunekern import _native

ARITHMETICS = ("fp32", "bf16", "int8")


def run_peak(operations: int, arithmetic: str) -> bool:
    """As many multiplications and additions as asked, in registers only. False where the core has none to run."""
    core = _native.core()
    try:
        one = core.run_peak(1, arithmetic=arithmetic)
        if not one:  # kernels of this set do not multiply so here
            return False
        core.run_peak(max(1, operations // one), arithmetic=arithmetic)
    except (TypeError, ValueError, RuntimeError):  # an older core knows fp32 alone, a CPU may lack the instruction
        return False
    return True


def rounded_gops(arithmetic: str, repeats: int = 100) -> float | None:
    """1e9 operations a second, the fastest of `repeats`; None where the core has none to run."""
    if not run_peak(1, arithmetic):
        return None
    core, best, done = _native.core(), float("inf"), 0
    for _ in range(repeats):
        start = time.perf_counter()
        done = core.run_peak(100_000, arithmetic=arithmetic)
        best = min(best, time.perf_counter() - start)
    return round(done / best / 1e9, 1)
