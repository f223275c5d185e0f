"""How far long work is: a bar on a terminal, a line now and then where output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

EVERY = 30.0  # seconds between lines
# A bar that moves by itself would take the interpreter from what is being timed: it is drawn between calls, this often.
DRAWN = 0.5
CONSOLE = Console()
Item = TypeVar("Item")


def say(text: str) -> None:
    """A line at once, also into a file."""
    CONSOLE.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(what: str) -> Iterator[Callable[[float], None]]:
    """Yields what is told the share that is done, 0 to 1: `progress` of `prunekern.machine.measure.interleaved`."""
    start = last = time.perf_counter()

    def line(share: float) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= EVERY:
            last = now
            say(f"{what}: {share:.0%} done after {now - start:.0f} s")

    if not CONSOLE.is_terminal:
        yield line
        return
    with Progress(console=CONSOLE, transient=True, auto_refresh=False) as shown:
        task = shown.add_task(what, total=1.0)
        shown.refresh()

        def draw(share: float) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= DRAWN:
                last = now
                shown.update(task, completed=share, refresh=True)

        yield draw


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, one after the other."""
    with bar(what) as tell:
        for i, item in enumerate(items):
            tell(i / len(items))
            yield item
