"""bench/faults: what it counts as what; a crash, a hang and an error are told apart."""

import json
import os
import random
import signal
import struct
import time

import pytest
import torch

from bench.faults import answers, calls, folders
from bench.faults.tally import Tally, in_fork, is_refusal
from prunekern.ops import compact_linear


def test_a_tally_counts_and_keeps_what_was_bad():
    tally = Tally("tries")
    for outcome in ("refused", "right", "right", "wrong", "crashed", "lost"):
        tally.add(outcome, f"what\n{outcome}")
    assert tally.row() == {"kind": "tries", "tried": 6, "refused": 1, "right": 2, "crashed": 1, "lost": 1, "wrong": 1}
    assert tally.bad == ["wrong: what wrong", "crashed: what crashed", "lost: what lost"]
    assert is_refusal(ValueError("x must be")) and not is_refusal(MemoryError()) and not is_refusal(ValueError())
    assert not is_refusal(AttributeError("has no attribute"))


def test_how_a_child_ended():
    def fail():
        raise ValueError

    assert in_fork(lambda: None) == 0
    assert in_fork(lambda: os._exit(3)) == 3
    assert in_fork(lambda: os.kill(os.getpid(), signal.SIGSEGV)) == -signal.SIGSEGV
    assert in_fork(lambda: time.sleep(60), limit=0.05) is None
    assert in_fork(lambda: time.sleep(60), kill_after=0.05) == -signal.SIGKILL


def test_at_least_200_bad_calls_and_each_good_one_is_right():
    found = calls.calls()
    assert len(found) > 1000
    good = [call for call in found if call.name.endswith("as it should be")]
    assert len(good) >= 14
    for call in good:
        assert calls.outcome(call) == ("right", ""), call.name


def test_outcomes_of_calls():
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    given = {"x": x, "packed": weight, "n_out": 2}

    def outcome(function, **changed):
        return calls.outcome(calls.Call("it", function, given | changed, answers.linear))[0]

    assert outcome(compact_linear) == "right"
    assert outcome(compact_linear, n_out=3) == "refused"
    assert outcome(lambda **given: compact_linear(**given) + 1e-2) == "wrong"
    assert outcome(lambda **given: torch.zeros(3, 3), n_out=3) == "wrong"  # accepted


def test_a_crash_is_counted_and_the_rest_goes_on(monkeypatch):
    """The child dies in the second of three calls."""
    lines = [["0", "began"], ["0", "refused"], ["1", "began"]], [["2", "began"], ["2", "right"]]

    class Done:
        def __init__(self, entries):
            self.stdout = "".join(json.dumps([int(n), f"call {n}", result, ""]) + "\n" for n, result in entries)
            self.returncode = -11

    runs = iter(lines)
    monkeypatch.setattr(calls, "calls", lambda: [None] * 3)
    monkeypatch.setattr(calls.subprocess, "run", lambda *args, **kwargs: Done(next(runs)))
    tally = calls.run()
    assert tally.row() | {"kind": ""} == {
        "kind": "", "tried": 3, "refused": 1, "right": 1, "crashed": 1, "lost": 0, "wrong": 0,
    }  # fmt: skip
    assert tally.bad == ["crashed: call 1: status -11"]


@pytest.mark.parametrize("kind", folders.KINDS)
def test_every_damage_changes_something(kind):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry | {"data_offsets": [16, 32]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(range(1, 33))
    files = {"config.json": json.dumps({"a": {"b": [1, 2]}, "c": 3}).encode(), "model.safetensors": weights}
    other = {"config.json": b"{}", "model.safetensors": b"other"}
    changed = [kind(random.Random(n), dict(files), sorted(files)[n % 2], other) != files for n in range(20)]
    assert sum(changed) >= 5
