"""How often something was tried, and how it went."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# right: a legal call, or a folder that loads, with the right answer. lost: neither the old nor the new is there.
OUTCOMES = ("refused", "right", "crashed", "lost", "wrong")
BAD = ("crashed", "lost", "wrong")
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)


@dataclass
class Tally:
    """kind: what was tried. bad: what it was that went wrong, one line each."""

    kind: str
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str = "") -> None:
        self.counts[outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{outcome}: {' '.join(what.split())}"[:400])

    def row(self) -> dict[str, object]:
        return {"kind": self.kind, "tried": sum(self.counts.values()), **self.counts}


def is_refusal(error: BaseException, accepted: tuple[type[BaseException], ...] = REFUSALS) -> bool:
    """Whether an error is one that says what is wrong."""
    return isinstance(error, accepted) and bool(str(error).strip())


def in_fork(work: Callable[[], None], kill_after: float | None = None, limit: float = 120.0) -> int | None:
    """Exit status of `work` in a forked child (0; 1 where it raised; below 0: the signal); None where it hung.

    kill_after: seconds until SIGKILL; a child that ended before has its own status.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + (limit if kill_after is None else kill_after)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if kill_after is None and status == -signal.SIGKILL else status
