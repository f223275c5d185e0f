"""bench/accuracy/calibration.py: its rows, on a tiny model."""

import torch

import prunekern as pk
from bench.accuracy.calibration import BLOCK, LANGUAGE, How, held, losses, row_of
from tests.helpers import tiny_decoders
from tests.helpers.tiny_models import attached, prune


def test_rows_of_a_tiny_model(tmp_path):
    model = tiny_decoders.build()
    prune(attached(model), 0.2)
    pk.save(pk.compact(model), tmp_path / "m")
    ids = torch.randint(3, 50, (3, BLOCK), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, how in LANGUAGE.items():
        model, calibration, seconds = held(tmp_path / "m", [{"input_ids": ids}], how, 64)
        found[name] = losses(model, ids), row_of(name, model, calibration, seconds)
    base = found["fp32"][0]
    assert base.shape == (3 * (BLOCK - 1),) and found["fp32"][1]["layers in"] is None
    for name, (loss, row) in found.items():
        assert abs(float((loss - base).mean())) < 0.2, name
        assert (row["seconds"] is not None) == LANGUAGE[name].calibrated == (row["median dB"] is not None)
    assert not torch.equal(found["int8"][0], base)
    mb = {name: row["MB"] for name, (_, row) in found.items()}
    assert mb["int4"] < mb["int8"] < mb["fp32"] and mb["int8"] <= mb["int8, calibrated"] < mb["fp32"]


def test_what_stands_beside_each_other():
    assert LANGUAGE["int8, x in fp32"].activations == "float" and LANGUAGE["int8"] == How("int8")
    assert {how.weights for how in LANGUAGE.values() if how.calibrated} == {"int8", "int4"}
