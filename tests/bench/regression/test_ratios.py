"""bench/regression/ratios.py: the check must be able to fail, and must not fail for noise."""

import json
import math

import pytest

from bench.regression import ratios, test_speed


@pytest.mark.parametrize("ratio", [0.84, 0.5, 0.0, math.nan])
def test_more_than_fifteen_percent_below_has_fallen(ratio):
    assert ratios.has_fallen(ratio, 1.0)
    assert ratios.has_fallen(3 * ratio, 3.0)


@pytest.mark.parametrize("ratio", [0.86, 1.0, 7.0])
def test_less_than_that_has_not(ratio):
    assert not ratios.has_fallen(ratio, 1.0)


def test_a_slow_kernel_stays_fallen_and_noise_does_not():
    slow = iter([0.8, 0.82, 0.79])
    assert ratios.has_fallen(ratios.confirmed(0.7, lambda: next(slow), 1.0), 1.0)
    assert next(slow, None) is None  # it was measured as often as allowed
    noisy = iter([0.97, 0.1])
    assert ratios.confirmed(0.7, lambda: next(noisy), 1.0) == 0.97
    assert next(noisy) == 0.1  # and not measured again once it was fine
    assert ratios.confirmed(0.99, lambda: pytest.fail("measured without need"), 1.0) == 0.99


def test_the_ratio_is_peer_over_ours():
    assert ratios.measure(lambda: None, lambda: sum(range(20000)), 0.05) > 10
    assert ratios.measure(lambda: sum(range(20000)), lambda: None, 0.05) < 0.1


def test_instruction_sets_have_baselines_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "BASELINE", tmp_path / "baseline.json")
    ratios.write("avx2", {"torch": "2"}, {"b": 1.23456, "a": 2.0})
    ratios.write("amx", {}, {"a": 3.0})
    ratios.write("avx2", {"torch": "3"}, {"a": 2.5})
    assert ratios.read("avx2") == {"a": 2.5} and ratios.read("amx") == {"a": 3.0} and ratios.read("generic") == {}
    assert json.loads(ratios.BASELINE.read_text())["avx2"]["machine"] == {"torch": "3"}


def test_the_committed_baseline_names_every_case():
    committed = json.loads(ratios.BASELINE.read_text())
    assert committed
    for isa, content in committed.items():
        assert set(content["ratios"]) | set(test_speed.FLOOR) == set(test_speed.CASES), isa


def test_a_case_without_a_baseline_has_a_floor():
    assert set(test_speed.FLOOR) < set(test_speed.CASES)
    assert all(floor >= 1.0 for floor in test_speed.FLOOR.values())
