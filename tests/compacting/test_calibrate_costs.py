"""`calibrate` by what layers cost, and for int4: what is held, and that load and save keep to it."""

import copy
import json

import pytest
import torch

import prunekern as pk
from prunekern.compacting.choosing import WIDE
from prunekern.compacting.head import word_head
from prunekern.ops.int4 import dequantize_weight_int4, quantize_weight_int4
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import attached, batch, logits, prune

NOTHING = -1000.0  # dB that every layer has


def decoder(family="llama", **options):
    model = tiny_decoders.build(family, **options)
    prune(attached(model), 0.3)
    return pk.compact(model)


def inputs(make=tiny_decoders.batch, count=4):
    return [make(seed=i) for i in range(count)]


def kinds(model):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, pk.nn.CompactLinear)}
    return {name: (m.weights, m.activations) for name, m in layers.items()}


def nats(model, **options):
    """What all layers cost where nothing is held in more bits."""
    return pk.calibrate(copy.deepcopy(model), inputs(), most_nats=1e9, **options).nats


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_no_more_is_lost_than_is_allowed(weights):
    small = decoder()
    everything = nats(small, weights=weights)
    assert everything > 0
    before = everything
    for share in (0.5, 0.1, 0.0):
        report = pk.calibrate(copy.deepcopy(small), inputs(), weights=weights, most_nats=share * everything)
        assert report.nats <= share * everything and report.nats < before
        before = report.nats
    assert set(report.held.values()) == {"fp32"} and "nats a prediction" in str(report)


def test_the_default_allows_what_it_says():
    small = decoder()
    report = pk.calibrate(small, inputs(), weights="int4")
    assert report.nats <= 0.02 and report.least_db <= min(layer.held_db for layer in report.layers)


def test_x_is_left_as_it_is_before_bits_are_added(tmp_path):
    """Where rounding x is what costs; and files say so."""
    small = decoder()
    with torch.no_grad():  # a large channel in what the head reads, which nothing makes smaller
        small.model.norm.weight[3] = 300.0
    everything = pk.calibrate(copy.deepcopy(small), inputs(), most_nats=1e9)
    assert everything.layers[-1].db < 40
    report = pk.calibrate(small, inputs(), most_nats=everything.nats / 10)
    assert report.layers[-1].held == WIDE and "lm_head" not in report.held
    assert (word_head(small).weights, word_head(small).activations) == ("int8", "float")
    pk.save(small, tmp_path / "m", command="x")
    assert "| `the head` | int8, x not rounded |" in (tmp_path / "m" / "README.md").read_text()
    back = pk.load(tmp_path / "m", weights="int8")
    assert kinds(back) == kinds(small)
    assert torch.equal(logits(back, inputs()[0]), logits(small, inputs()[0]))
    assert word_head(pk.load(tmp_path / "m", weights="int8", activations="int8")).activations == "float"
    assert word_head(pk.load(tmp_path / "m")).activations == "auto"
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    assert "head" in config["quantization_config"]["held"]["float_x"]
    for wrong, message in ((["nobody"], "layer 'nobody' is not in the plan"), ("head", "float_x must be a list")):
        config["quantization_config"]["held"]["float_x"] = wrong
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            pk.load(tmp_path / "m", weights="int8")


@pytest.mark.parametrize("make", [decoder, small_model])
def test_int4_loses_less_compensated(make):
    """In all layers together, and on texts that were not seen. Rows of a tiny model's inputs are few: 1 dB."""
    which, db, error = (tiny_decoders.batch if make is decoder else batch), {}, {}
    for compensates in (False, True):
        small = make()
        want = logits(small, which(seed=99))
        found = pk.calibrate(small, inputs(which, 60), NOTHING, "int4", compensates=compensates)
        layers = [layer for layer in found.layers if layer.name != "lm_head"]
        db[compensates] = sum(layer.db for layer in layers) / len(layers)
        error[compensates] = float((logits(small, which(seed=99)) - want).norm())
    assert db[True] > db[False] + 1
    assert error[True] < error[False]


def test_compensated_weights_are_what_is_held_and_saved(tmp_path):
    """hold=False leaves fp32 numbers that int4 holds as they are; layers held in int8 have their own weights."""
    small = decoder()
    before, half = copy.deepcopy(small), nats(small, weights="int4", smooths=False) / 2
    report = pk.calibrate(small, inputs(), weights="int4", hold=False, smooths=False, most_nats=half)
    assert 0 < len(report.held) < len(report.layers)
    for layer in report.layers[:-1]:
        weight, old = (m.get_submodule(layer.name).weight for m in (small, before))
        if layer.held == "int4":
            again = dequantize_weight_int4(*quantize_weight_int4(weight), weight.shape[1])
            assert torch.equal(again, weight) and not torch.equal(weight, old), layer.name
        else:
            assert torch.equal(weight, old), layer.name
    pk.save(small, tmp_path / "m")
    back = pk.load(tmp_path / "m", weights="int4")
    for layer in report.layers:
        assert kinds(back)[layer.name][0] == ("int8" if layer.held == WIDE else layer.held)
    got, want = logits(back, inputs()[0]), logits(small, inputs()[0])
    assert (got - want).norm() < 0.2 * want.norm()


def test_embeddings_that_a_head_is_tied_to_stay():
    small = decoder(tie_word_embeddings=True)
    before = small.get_input_embeddings().weight.clone()
    pk.calibrate(small, inputs(), NOTHING, "int4")
    assert torch.equal(small.get_input_embeddings().weight, before)


def test_arguments_are_refused_by_name():
    for options, message in (
        ({"most_nats": -1.0}, r"most_nats must be a finite number, 0 or more \(got -1.0\)"),
        ({"most_nats": float("nan")}, r"most_nats must be a finite number, 0 or more \(got nan\)"),
        ({"most_nats": 0.1, "least_db": 20.0}, r"most_nats must be None beside least_db \(got 0.1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.calibrate(decoder(), inputs(), **options)
