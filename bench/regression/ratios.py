"""Ratios of times, and whether one has fallen: what `make bench-check` decides with.

A ratio is the peer's time over ours, both minima of calls that took turns in one process: it survives another clock
frequency or a busy machine far better than milliseconds do. Each instruction set has a baseline of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from prunekern.machine.measure import interleaved

BASELINE = Path(__file__).with_name("baseline.json")
# Of the baseline. Four runs of the suite on a shared machine lay within 7 % of each other, but for one case in 80.
ALLOWED = 0.15
ATTEMPTS = 4


def has_fallen(ratio: float, baseline: float) -> bool:
    """Whether `ratio` (peer / ours) is more than ALLOWED below its baseline. NaN has fallen."""
    return not ratio >= (1 - ALLOWED) * baseline


def measure(ours: Callable[[], object], peer: Callable[[], object], seconds: float) -> float:
    """Fastest call of `peer` over the fastest of `ours`, in turn for `seconds` (at least five turns)."""
    best = interleaved({"peer": peer, "ours": ours}, seconds, 5)
    return best["peer"] / best["ours"]


def confirmed(first: float, again: Callable[[], float], baseline: float) -> float:
    """The best ratio of up to ATTEMPTS: `first`, then `again()` for as long as it looks fallen.

    Noise only ever makes a minimum worse, so a kernel that got slower stays fallen however often it is measured.
    """
    best = first
    for _ in range(ATTEMPTS - 1):
        if not has_fallen(best, baseline):
            break
        best = max(best, again())
    return best


def read(isa: str) -> dict[str, float]:
    """{case: ratio} of one instruction set; empty where nobody has measured it."""
    return json.loads(BASELINE.read_text()).get(isa, {}).get("ratios", {})


def write(isa: str, machine: dict, ratios: dict[str, float]) -> None:
    """Replace the baseline of one instruction set."""
    content = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    content[isa] = {"machine": machine, "ratios": {case: round(ratio, 3) for case, ratio in sorted(ratios.items())}}
    BASELINE.write_text(json.dumps(content, indent=2) + "\n")
