"""The demo end to end, on the real model and sentences, with few steps."""

import dataclasses
import json

import pytest
import torch

import prunekern as pk
from prunekern.demo import run as demo


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    options = dataclasses.replace(demo.OPTIONS, max_steps=12)
    return out, demo.run(out, sparsity=0.3, options=options, seconds=0.5)


def test_budget_is_met_and_nothing_changes_at_removal(report):
    out, r = report
    plan = pk.Plan.from_dict(json.loads((out / "compact" / "config.json").read_text())["quantization_config"]["plan"])
    assert 0.3 <= plan.sparsity() < 0.3 + 1e-3
    assert r["trained"]["sparsity"] == plan.sparsity()
    assert r["difference"] <= 1e-4
    assert r["same_predictions"] == 1.0
    assert r["score"]["masked"] == r["score"]["compact"]


def test_figures_are_those_of_the_files(report):
    out, r = report
    compact = pk.load(out / "compact")
    assert r["parameters"]["compact"] == sum(p.numel() for p in compact.parameters())
    saved = r["bytes"]["dense"] - r["bytes"]["compact"]
    removed = 4 * (r["parameters"]["dense"] - r["parameters"]["compact"])
    assert abs(saved - removed) < 20_000  # headers aside, the file shrinks by what was removed
    assert json.loads((out / "report.json").read_text())["score"] == r["score"]
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    for shape in ("1x128", "8x128"):
        row = r["latency"][shape]
        assert row["speedup"] == pytest.approx(row["dense"] / row["compact"])
        assert row["of_ideal"] == pytest.approx(row["speedup"] / r["ideal_speedup"])


def test_adapter_merges_to_the_same_model(report, tmp_path):
    from typer.testing import CliRunner

    from prunekern.cli import app

    out, _ = report
    result = CliRunner().invoke(app, ["compact", "mini-distilbert", str(out / "adapter"), str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    first, second = pk.load(out / "compact").state_dict(), pk.load(tmp_path / "again").state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
