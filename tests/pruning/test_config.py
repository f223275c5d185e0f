"""PruneConfig: defaults of the paper's setting, every field refused by name, plain data both ways."""

import json

import numpy as np
import pytest

import prunekern as pk


def test_defaults():
    c = pk.PruneConfig()
    assert (c.rank, c.alpha, c.dropout, c.preset, c.targets) == (8, 16.0, 0.0, "full", None)
    assert (c.sparsity, c.cost, c.align, c.norm_grad, c.seed) == (0.25, "params", 1, "detached", 0)


def test_round_trip_through_json():
    for c in (
        pk.PruneConfig(rank=4, sparsity=0.5, cost="macs", align=8, preset="paper"),
        pk.PruneConfig(targets=["q_lin", "lin1"], seed=3),
        pk.PruneConfig(),
    ):
        assert pk.PruneConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_targets_take_the_place_of_the_preset():
    c = pk.PruneConfig(targets=["q_lin"])
    assert c.preset is None and c.targets == ("q_lin",)


def test_is_frozen():
    with pytest.raises(AttributeError):
        pk.PruneConfig().rank = 3


@pytest.mark.parametrize(
    "field,value,accepted",
    [
        ("rank", 0, "an integer of at least 1"),
        ("rank", -1, "an integer of at least 1"),
        ("rank", 2.0, "an integer of at least 1"),
        ("rank", True, "an integer of at least 1"),
        ("align", 0, "an integer of at least 1"),
        ("align", 1.5, "an integer of at least 1"),
        ("seed", -1, "a non-negative integer"),
        ("ramp_steps", -5, "a non-negative integer"),
        ("ramp_steps", 2.5, "a non-negative integer"),
        ("warm_steps", -1, "a non-negative integer"),
        ("spread", float("nan"), "non-negative and finite"),
        ("sparsity", 1.0, r"in \[0, 1\)"),
        ("sparsity", -0.01, r"in \[0, 1\)"),
        ("sparsity", 25, r"in \[0, 1\)"),
        ("sparsity", float("nan"), r"in \[0, 1\)"),
        ("sparsity", "0.5", r"in \[0, 1\)"),
        ("sparsity", None, r"in \[0, 1\)"),
        ("dropout", 1.0, r"in \[0, 1\)"),
        ("dropout", -0.1, r"in \[0, 1\)"),
        ("alpha", 0, "positive and finite"),
        ("alpha", -16.0, "positive"),
        ("alpha", float("inf"), "positive"),
        ("alpha", float("nan"), "positive"),
        ("temperature", 0.0, "positive"),
        ("temperature", float("inf"), "positive"),
        ("cost", "flops", r"one of \('params', 'macs'\)"),
        ("cost", None, r"one of \('params', 'macs'\)"),
        ("norm_grad", "none", "'detached' or 'full'"),
        ("preset", "papers", r"one of \('full', 'paper'\)"),
        ("preset", None, None),
        ("targets", "q_lin", "a list of module names"),
        ("targets", [], "a list of module names"),
        ("targets", [3], "a list of module names"),
        ("targets", 3, "a list of module names"),
    ],
)
def test_refusals_name_the_field_and_the_value(field, value, accepted):
    if accepted is None:  # no preset and no targets
        with pytest.raises(ValueError, match=r"PruneConfig: targets must be .* when preset is None \(got None\)"):
            pk.PruneConfig(preset=None)
        return
    with pytest.raises(ValueError, match=f"PruneConfig: {field} must be {accepted}") as info:
        pk.PruneConfig(**{field: value})
    assert f"(got {value!r})" in str(info.value)


def test_bounds_that_are_allowed():
    pk.PruneConfig(sparsity=0, dropout=0, alpha=1e-9, warm_steps=0, ramp_steps=0, spread=0, align=10_000)
    pk.PruneConfig(sparsity=0.999999, dropout=0.999999)


def test_from_dict_refuses_an_unknown_field_by_name():
    with pytest.raises(ValueError, match=r"PruneConfig: unknown field 'spars'; accepted: \['rank', "):
        pk.PruneConfig.from_dict({"spars": 0.5})


def test_numbers_of_numpy_become_plain_ones():
    config = pk.PruneConfig(sparsity=np.float32(0.25), rank=np.int64(4), alpha=np.float64(8), seed=np.uint8(3))
    assert (config.sparsity, config.rank, config.alpha, config.seed) == (0.25, 4, 8.0, 3)
    assert pk.PruneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"rank must be an integer of at least 1 \(got np.float32\(4.0\)\)"):
        pk.PruneConfig(rank=np.float32(4))
