"""Smoothing: the function stays, large channels get small, and what is not linear or is a residual is left alone."""

import copy

import pytest
import torch

import prunekern as pk
from prunekern.compacting.listening import run
from prunekern.compacting.smoothing import Largest, smooth, smoothings_of
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_decoders import FAMILIES, batch, build, names
from tests.helpers.tiny_models import attached, difference, logits, prune
from tests.helpers.tiny_models import batch as encoder_batch


def decoder(family="llama", share=0.4, **options):
    model = build(family, **options)
    prune(attached(model), share)
    return pk.compact(model)


def outlying(model, layer=0, by=50.0):
    """Large channels in all that a block's layers read: of its norms, of what up makes, of a value channel."""
    block = model.model.layers[layer]
    with torch.no_grad():
        block.input_layernorm.weight[3] = by
        block.post_attention_layernorm.weight[5] = by
        block.mlp.up_proj.weight[7] *= by
        block.self_attn.v_proj.weight[2] *= by
    return model


def smoothed(model, inputs, monkeypatch, share):
    monkeypatch.setattr("prunekern.compacting.smoothing.SHARES", (share,))
    where = smoothings_of(model, pk.plan(model))
    seen = {name: Largest(name, model.get_submodule(name), 1000) for one in where for name in one.readers}
    run(model, [inputs], list(seen.values()))
    smooth(model, where, seen, lambda x, weight: 0.0)
    return where, seen


@pytest.mark.parametrize("share", [0.35, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family, share, monkeypatch):
    model = outlying(decoder(family, dtype=torch.float64).float()).double()
    want, before = logits(model, batch()), copy.deepcopy(model.state_dict())
    smoothed(model, batch(), monkeypatch, share)
    assert difference(logits(model, batch(seed=5)), logits(outlying_twin(model, before), batch(seed=5))) < 1e-10
    assert difference(logits(model, batch()), want) < 1e-10
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    n = names()
    assert {n[k] + ".weight" for k in ("q", "k", "v", "o", "gate", "up", "down")} <= changed
    assert "model.layers.0.input_layernorm.weight" in changed and "model.norm.weight" not in changed


def outlying_twin(model, state):
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    return twin


def test_large_channels_get_small(monkeypatch):
    model = outlying(decoder())
    before = smoothed(copy.deepcopy(model), batch(), monkeypatch, 0.0)[1]
    smoothed(model, batch(), monkeypatch, 0.5)
    after = smoothed(model, batch(), monkeypatch, 0.0)[1]
    for kind in ("q", "up", "down", "o"):
        crest = [float(tops[names()[kind]].top.max() / tops[names()[kind]].top.median()) for tops in (before, after)]
        assert crest[1] < 0.7 * crest[0], kind


def test_share_zero_changes_nothing(monkeypatch):
    model = outlying(decoder())
    before = copy.deepcopy(model.state_dict())
    smoothed(model, batch(), monkeypatch, 0.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_calibrate_gains_decibels():
    report = {
        smooths: pk.calibrate(outlying(decoder()), [batch()], least_db=-1000.0, smooths=smooths)
        for smooths in (False, True)
    }
    db = {smooths: {loss.name: loss.db for loss in found.layers} for smooths, found in report.items()}
    worst = {smooths: min(found.values()) for smooths, found in db.items()}
    assert worst[True] > worst[False] + 6
    assert sum(db[True].values()) > sum(db[False].values()) + len(db[True])


@pytest.mark.parametrize("options", [{"activations": "float"}, {"weights": "bf16"}, {"smooths": False}])
def test_nothing_is_scaled_where_x_is_not_rounded_to_8_bits(options):
    model = outlying(decoder())
    before = copy.deepcopy(model.state_dict())
    pk.calibrate(model, [batch()], hold=False, **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_encoders_are_left_alone():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    assert smoothings_of(model, pk.plan(model)) == []
    pk.calibrate(model, [encoder_batch()], hold=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_removed(share):
    model = decoder(share=share)
    want = logits(model, batch())
    pk.calibrate(model, [batch()], least_db=1000.0)  # all fp32 again
    assert difference(logits(model, batch()), want) < 1e-5


def test_a_saved_model_is_smoothed(tmp_path):
    model = outlying(decoder())
    pk.calibrate(model, [batch()], hold=False)
    want = logits(model, batch())
    pk.save(model, tmp_path / "m")
    assert difference(logits(pk.load(tmp_path / "m"), batch()), want) < 1e-6
