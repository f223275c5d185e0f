"""bench/cpu/layers_narrow.py: what its tables hold against what, and a wrong answer of 8 bits is seen."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from bench.common import peers_narrow, safe
from bench.common.answers import randn
from bench.cpu import layers_narrow as narrow
from prunekern import _native


def test_of_several_peers_the_fastest_counts():
    best = {"ours": 2.0, "dynamic x86": 5.0, "dynamic onednn": 3.0, "qlinear": 4.0, "qlinear int8 x": 1.0}
    assert narrow.seconds_of(best, ("dynamic",)) == 3.0
    assert narrow.seconds_of(best, "qlinear") == 4.0  # not the other whose name begins so


def test_every_comparison_names_contestants():
    for precision, against in narrow.AGAINST.items():
        names = peers_narrow.PEERS[precision]
        best = {name: 1.0 for name in names}
        for one, other, _ in against.values():
            assert one in names and narrow.seconds_of(best, other) == 1.0


def test_what_must_hold_fails_where_it_does_not():
    row = {"rows": 128, "N": 8, "K": 8, "of peak": 0.9}
    good = row | {"x dynamic": 1.3, "x qlinear": 1.0, "x qlinear int8 x": 0.9, "x fp32": 3.0}
    slow = good | {"rows": 1, "x fp32": 0.9}
    assert all(entry["holds"] is not False for entry in narrow.held("int8", [good]).values())
    holds = narrow.held("int8", [good, slow])
    assert holds["int8 x fp32, lowest of any rows"]["holds"] is False
    assert holds["int8 x fp32, lowest of any rows"]["at"] == "1 rows, 8 x 8"
    assert holds["int8 x dynamic, from 128 rows"]["holds"] is True
    assert narrow.held("int8", [good | {"of peak": 0.7}])["int8 of its peak, from 128 rows"]["holds"] is False
    assert narrow.held("int8", [good | {"of peak": None}])["int8 of its peak, from 128 rows"]["holds"] is None


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
def test_a_wrong_answer_is_no_figure(monkeypatch):
    def wrong(weight, bias, m):
        return peers_narrow.same, lambda x: torch.nn.functional.linear(x, weight.roll(1, 0), bias)

    monkeypatch.setitem(peers_narrow.PEERS, "int8", {"a peer": wrong})  # oneDNN's own would die on some CPUs
    args = argparse.Namespace(seconds=0.001, threads=1)
    with torch.no_grad(), pytest.raises(SystemExit, match="a peer, int8: wrong answer"):
        narrow.row_of("int8", randn(64, 32), randn(64), randn(4, 32), args, 10.0)


def test_a_process_that_would_die_starts_anew(monkeypatch):
    started = []
    monkeypatch.delenv(safe.VARIABLE, raising=False)
    monkeypatch.setattr(safe, "bf16_matmul_crashes", lambda: True)
    monkeypatch.setattr(safe.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(safe.os, "environ", dict(safe.os.environ))
    safe.without_amx_if_it_kills()
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert safe.os.environ[safe.VARIABLE] == safe.WITHOUT_AMX
    assert safe.without_amx_if_it_kills() == safe.WITHOUT_AMX and len(started) == 1
