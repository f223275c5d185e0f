"""bench/common/peaks.py: as many operations as asked, and nothing where the core has no such arithmetic."""

from types import SimpleNamespace

import pytest

from bench.common import peaks


def core(known: str, asked: list[int]):
    def run_peak(steps: int, arithmetic: str = "fp32") -> int:
        if arithmetic != known:
            raise ValueError(arithmetic)
        asked.append(steps)
        return 1024 * steps

    return SimpleNamespace(run_peak=run_peak)


def test_as_many_operations_as_asked(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(peaks._native, "core", lambda: core("int8", asked))
    assert peaks.run_peak(1_000_000, "int8") and asked == [1, 976]
    assert peaks.rounded_gops("int8", repeats=2) > 0 and asked[-1] == 100_000
    assert not peaks.run_peak(1_000_000, "bf16") and peaks.rounded_gops("bf16") is None


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
def test_a_core_without_it_is_no_error(monkeypatch, error):
    def run_peak(*args, **more):
        raise error

    monkeypatch.setattr(peaks._native, "core", lambda: SimpleNamespace(run_peak=run_peak))
    assert not peaks.run_peak(100, "bf16")
