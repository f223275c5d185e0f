"""bench/common/progress.py: lines where there is no terminal, at most one in so many seconds."""

import io

from rich.console import Console

from bench.common import bits, progress


def test_lines_now_and_then_without_a_terminal(monkeypatch):
    out, now = io.StringIO(), iter(range(0, 1000, 20))
    monkeypatch.setattr(progress, "CONSOLE", Console(file=out, force_terminal=False))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    assert list(progress.track("abcdef", "letters")) == list("abcdef")
    assert out.getvalue().splitlines() == [
        "letters: 17% done after 40 s", "letters: 50% done after 80 s", "letters: 83% done after 120 s",
    ]  # fmt: skip


def test_flags_come_back():
    flags = [True, False, True] * 5
    assert bits.unpacked(bits.packed(flags), 15).tolist() == flags
    assert bits.unpacked("f0").tolist() == [True] * 4 + [False] * 4
