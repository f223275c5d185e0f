"""bench/accuracy/calibration.py: its rows, on a tiny model."""

import math

import torch

import prunekern as pk
from bench.accuracy.calibration import BLOCK, LANGUAGE, blocks, calibrated, losses, row_of
from tests.helpers import tiny_decoders
from tests.helpers.tiny_models import attached, prune


class Tokenizer:
    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def test_rows_of_a_tiny_model(tmp_path):
    model = tiny_decoders.build()
    prune(attached(model), 0.2)
    pk.save(pk.compact(model), tmp_path / "m")
    ids = blocks(Tokenizer(), ["some words and more"] * 40, 3)
    assert ids.shape == (3, BLOCK) and (ids == 2).any()
    found = {}
    for name, how in LANGUAGE.items():
        model, calibration, seconds = calibrated(tmp_path / "m", [{"input_ids": ids}], how, 64)
        found[name] = losses(model, ids), row_of(name, calibration, seconds)
    base = found["fp32"][0]
    assert base.shape == (3 * (BLOCK - 1),) and found["fp32"][1]["in more bits"] is None
    for name, (loss, row) in found.items():
        assert abs(float((loss - base).mean())) < 0.2, name
        if name != "fp32":
            assert row["in more bits"].endswith(" of 15") and 10 < row["worst layer, dB"] < row["median"] < math.inf
    assert not torch.equal(found["int8"][0], base)


def test_what_is_left_in_fp32_is_nearer():
    assert LANGUAGE["int8, x left in fp32"][1] == "float" and LANGUAGE["int8"][1] == "auto"
    assert [how[2] for how in LANGUAGE.values() if how is not None].count(True) >= 4
