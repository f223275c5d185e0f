"""Models of the benchmarks: that one model is raced under different names, and the tables' arithmetic."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import prunekern as pk
from bench.common import peers_models_narrow, shapes, sliced, tried
from bench.common.answers import check_logits
from bench.common.peers_models_narrow import STATIC
from bench.common.report import ROOT
from bench.cpu import models
from tests.helpers import tiny_models


def ragged_plan(dense, family):
    """A plan in which one head lost its queries and keys, and another its values."""
    pruner = pk.attach(copy.deepcopy(dense), pk.PruneConfig())
    generator = torch.Generator().manual_seed(0)
    q, v = (tiny_models.names(family)[part] for part in "qv")
    for name, mask in pruner.masks.items():
        mask.logits.data = torch.randn(mask.logits.shape, generator=generator)
        if name == q:
            mask.logits.data[: tiny_models.HEAD_DIM] = -1
        if name == v:
            mask.logits.data[-tiny_models.HEAD_DIM :] = -1
    return pk.plan(pruner.model)


@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_the_sliced_peer_is_the_masked_model(family):
    dense = tiny_models.build(family)
    plan = ragged_plan(dense, family)
    inputs = tiny_models.batch()
    exact = sliced.masked(dense, plan)(**inputs).logits
    small = sliced.sliced(dense.double(), plan)
    torch.testing.assert_close(small(**inputs).logits, exact, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(dense(**inputs).logits, exact, rtol=1e-2, atol=1e-2)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (small, dense)]
    assert sizes[0] < sizes[1]


def test_the_gate_refuses_a_wrong_answer():
    exact = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    check_logits("a peer", exact.float(), exact)
    for wrong in (exact + 1e-3, exact * float("nan")):
        with pytest.raises(SystemExit, match="a peer: wrong answer"):
            check_logits("a peer", wrong.float(), exact)


def test_ratios_are_against_the_best_peer():
    ms = {("a", "dense"): 8.0, ("a", "sliced"): 6.0, ("b", "dense"): 9.0, ("b", "sliced"): 5.0, ("c", "dense"): 7.0}
    ms |= {("compact", "fp32"): 4.0, ("compact", "bf16"): 2.0}
    noise = dict.fromkeys(ms, 55.0)
    rows = models.rows_of("model", (1, 128), "bf16", ms, noise)
    ratios = [(row["peer"], row["x_dense"], row["x_sliced"]) for row in rows]
    assert ratios == [("a", 4.0, 3.0), ("b", 4.5, 2.5), ("c", 3.5, None)]
    row = models.summary_of(rows, "bf16", ms, noise, ideal=4 / 3)
    assert (row["weights"], row["best_dense"], row["x_best_dense"]) == ("bf16", "c 7.00", 3.5)
    assert (row["best_sliced"], row["x_best_sliced"], row["x_static"]) == ("b 5.00", 2.5, None)
    assert row["x_fp32"] == 2.0


def test_the_best_peer_of_int8_rounds_activations_as_they_come():
    ms = {(STATIC, "dense"): 3.0, (STATIC, "sliced"): 2.5, ("a", "dense"): 4.0, ("a", "sliced"): 3.0}
    ms |= {("compact", "fp32"): 5.0, ("compact", "int8"): 2.0}
    noise = dict.fromkeys(ms, 40.0)
    rows = models.rows_of("model", (1, 128), "int8", ms, noise)
    row = models.summary_of(rows, "int8", ms, noise, ideal=4 / 3)
    assert (row["best_dense"], row["x_best_dense"], row["best_sliced"]) == ("a 4.00", 2.0, "a 3.00")
    assert row["x_static"] == 1.5


def test_a_wrong_answer_of_8_bits_is_seen():
    exact = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert models.right("a peer", exact.float() + 0.01, exact, "int8") > 35
    for wrong in (exact * 0.6, exact * float("nan")):
        with pytest.raises(SystemExit, match="a peer: wrong answer"):
            models.right("a peer", wrong.float(), exact, "int8")


def test_a_missing_peer_says_what_installs_it():
    with pytest.raises(peers_models_narrow.Missing, match="not installed: pip install no_such_package "):
        peers_models_narrow.needed("no_such_package")


def test_a_peer_that_kills_its_process_is_told_from_one_that_fails(monkeypatch):
    for status, dies in ((0, False), (1, False), (-4, True)):
        monkeypatch.setattr(tried.subprocess, "run", lambda *a, s=status, **k: subprocess.CompletedProcess(a, s))
        assert tried.dies("int8", "a peer") is dies


def test_quick_run(tmp_path):
    """In a process of its own: where 8-bit products kill a process, the script takes care of that."""
    command = [sys.executable, "-m", "bench.cpu.models", "--quick", "--precision", "int8"]
    command += ["--peers", "PyTorch dynamic,CTranslate2", "--out", str(tmp_path / "it")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "it.json").read_text())
    (row,) = [row for row in result["rows"] if row["peer"] == "PyTorch dynamic"]
    assert row["x_dense"] > 0 and row["x_sliced"] > 0 and row["SQNR_dB"] > 15
    told = {entry["peer"] for entry in result["missing"]} | {row["peer"] for row in result["rows"]}
    assert "CTranslate2" in told
    assert result["summary"][0]["weights"] == "int8" and (tmp_path / "it.png").stat().st_size > 1000


def test_a_plan_keeps_the_share_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny", tiny_models.build)
    dense = shapes.dense_model("tiny")
    small, plan = shapes.ragged(dense, 0.4, cost="macs")
    assert abs(plan.macs() / plan.dense_macs() - 0.6) < 0.02
    widths = [len(layer.rows) for name, layer in plan.layers.items() if name.endswith("ffn.lin1")]
    assert len(set(widths)) == len(widths)  # ragged
    inputs = tiny_models.batch()
    check_logits("compact", small(**inputs).logits, sliced.masked(dense, plan)(**inputs).logits)
