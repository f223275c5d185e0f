"""What is seen of work that takes long: a bar on a terminal; where output is a file, a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 2.0  # shorter work shows nothing
LINE_SECONDS = 15.0  # between two lines in a file

T = TypeVar("T")


class Bar(Progress):
    """rich's `Progress`, gone when the work is done; it shows once the work takes longer than QUIET_SECONDS.

    Where the console is no terminal it prints a line of its first task at most every LINE_SECONDS: what is done, of how
    much, and the seconds it took. console: None for standard error, so that a program's own output stays what it is.
    columns: after the usual ones.
    """

    def __init__(self, *columns: ProgressColumn | str, console: Console | None = None):
        usual = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(*usual, *columns, console=console or Console(stderr=True), transient=True)
        self._began = self._said = time.monotonic()
        self._shows = False

    def start(self) -> None:
        """Begin to count the seconds: the bar itself comes later, with what moves it."""
        self._began = self._said = time.monotonic()

    def stop(self) -> None:
        """Take the bar away, where there is one: rich would end a file with an empty line."""
        if self._shows:
            super().stop()

    def update(self, task_id: Any, **fields: Any) -> None:
        """As `Progress.update`."""
        super().update(task_id, **fields)
        self._show()

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """As `Progress.advance`."""
        super().advance(task_id, advance)
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._began <= QUIET_SECONDS:
            return
        if self.console.is_terminal or self.console.is_jupyter:
            if not self._shows:
                self._shows = True
                super().start()
        elif now - self._said > LINE_SECONDS or self._said == self._began:
            self._said = now
            task = self.tasks[0]
            of = "" if task.total is None else f" {task.completed:,.0f} of {task.total:,.0f},"
            text = task.fields.get("text", "")
            self.console.print(f"{task.description}:{of} {now - self._began:.0f} s{'  ' + text if text else ''}")


def track(items: Iterable[T], description: str, console: Console | None = None) -> Iterator[T]:
    """The items, one after another, with a `Bar` over them."""
    with Bar(console=console) as bar:
        task = bar.add_task(description, total=len(items) if isinstance(items, Sized) else None)
        for item in items:
            yield item
            bar.advance(task)
