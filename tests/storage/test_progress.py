"""Progress of long work: nothing while it is short, a bar on a terminal, lines in a file."""

import io

import pytest
from rich.console import Console
from rich.progress import TextColumn

from prunekern.storage import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(clock, seconds, is_terminal=False, total=10):
    """What `total` items print that take `seconds` in all."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100)
    for _ in progress.track(range(total), "weighing", console):
        clock[0] += seconds / total
    return out.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_short_work_shows_nothing(clock, is_terminal):
    assert shown(clock, 1.9, is_terminal) == ""


def test_a_file_gets_a_line_now_and_then(clock):
    lines = shown(clock, 100.0).splitlines()
    # After the first item past two seconds, and then once more than 15 seconds have gone by: at 10, 30, 50, ...
    assert lines == [f"weighing: {n} of 10, {10 * n} s" for n in (1, 3, 5, 7, 9)]


def test_a_terminal_gets_a_bar(clock):
    text = shown(clock, 10.0, is_terminal=True)
    assert "weighing" in text and "10/10" in text and " s\n" not in text


def test_a_line_holds_what_the_bar_says_besides(clock):
    out = io.StringIO()
    with progress.Bar(TextColumn("{task.fields[text]}"), console=Console(file=out, width=100)) as bar:
        task = bar.add_task("stage one", total=None, text="")
        clock[0] += 3
        bar.update(task, description="stage two", text="loss 0.5")
    assert out.getvalue() == "stage two: 3 s  loss 0.5\n"


def test_items_come_through_and_errors_too(clock):
    assert list(progress.track(iter("abc"), "counting")) == ["a", "b", "c"]
    with pytest.raises(KeyError):
        for item in progress.track("abc", "counting"):
            raise KeyError(item)
