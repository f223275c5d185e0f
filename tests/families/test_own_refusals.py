"""What cannot be registered or attached is said by name: the layer, the group, and what was wrong with it."""

import re

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern import families
from prunekern.families import attention_group, mlp_group, residual_group
from prunekern.families.table import Group, Layer, Table, channels
from tests.helpers.own_models import Encoder, Mlp, attached, build, inputs


class Lone(nn.Module):
    """Everything that can be wrong with a layer, in one module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 9)
        self.conv, self.norm = nn.Conv1d(6, 8, 1), nn.LayerNorm(6)
        self.tied, self.first = nn.Linear(6, 8), nn.Embedding(8, 6)
        self.tied.weight = self.first.weight
        self.again = self.b
        self.same = nn.Linear(6, 8)
        self.net = nn.Sequential(self.same, nn.ReLU())
        self.mha = nn.MultiheadAttention(8, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8)}) for _ in range(2))
        self.layers[0]["down"] = nn.Linear(8, 6)


@pytest.fixture
def refused():
    """refused(groups, head=None): what attaching a Lone registered so says."""

    def say(groups, **options):
        families.register(Lone, groups, **options)
        try:
            model = Lone()
            before = {name: type(module) for name, module in model.named_modules()}
            with pytest.raises(ValueError) as error:
                pk.attach(model, pk.PruneConfig(rank=2))
            assert before == {name: type(module) for name, module in model.named_modules()}
            return str(error.value)
        finally:
            families.unregister(Lone)

    return say


@pytest.mark.parametrize(
    "groups, said",
    [
        ([mlp_group("a", "nope")], "'nope' matches no module; linears end in a, b, c"),
        ([mlp_group("layers.{}.up", "layers.{}.down")], "there is no module 'layers.1.down'"),
        ([mlp_group("layers.{}.off", "layers.{}.down")], "'layers.{}.off' matches no module"),
        ([residual_group("norm")], "'norm' must be a torch.nn.Linear (got torch.nn.modules.normalization.LayerNorm)"),
        ([mlp_group("conv", "b")], "layer 'conv' must be a torch.nn.Linear (got torch.nn.modules.conv.Conv1d)"),
        ([mlp_group("a", "c")], "mlp_group(up='a', down='c'): down must read the 8 rows of up (got 6 columns)"),
        ([mlp_group("tied", "layers.0.down", gate="c")], "layer 'tied' must have a weight of its own"),
        ([mlp_group("a", "layers.0.down", gate="c")], "gate must have the 8 rows of up (got 9)"),
        ([residual_group("tied")], "have a weight of its own (got one shared by tied.weight, first.weight)"),
        ([residual_group("again")], "'again' matches no module"),
        ([mlp_group("a", "b")], "layer 'b' must stand in one place (got b, again)"),
        ([residual_group("same")], "layer 'same' must stand in one place (got same, net.0)"),
        ([residual_group("normed")], "layer 'normed' must hold its weight as a parameter"),
        ([residual_group("mha.out_proj")], "layer 'mha.out_proj' is part of a MultiheadAttention"),
        (
            [mlp_group("a", "layers.0.down"), residual_group("a")],
            "rows of layer 'a' belong to one group only (got mlp_group(up='a', down='layers.0.down') and "
            "residual_group(layer='a'))",
        ),
        (
            [mlp_group("a", "layers.0.down"), mlp_group("layers.1.up", "layers.0.down")],
            "columns of layer 'layers.0.down' belong to one group only",
        ),
        ([attention_group("a", "c", "layers.0.up", "layers.0.down", 4)], "k must have 8 rows, 2 for each of 4 heads"),
        (
            [attention_group("a", "layers.0.up", "layers.1.up", "layers.0.down", 3)],
            "heads must divide the 8 rows of q (got 3)",
        ),
        (
            [attention_group("c", "layers.0.up", "layers.1.up", "layers.0.down", 3)],
            "k must have 9 rows, 3 for each of 3 heads (got 8)",
        ),
        ([attention_group("a", "layers.0.up", "c", "layers.0.down", 4)], "v must have as many rows for each of 4"),
        (
            [attention_group("a", "layers.0.up", "layers.1.up", "c", 4)],
            "o must read 8 channels, 2 of each of 4 heads (got 6)",
        ),
        (
            [attention_group("a", "layers.0.up", "layers.1.up", "layers.0.down", 8, rotary=True)],
            "rotary needs heads of an even width (got 1)",
        ),
        (lambda model: [], "groups must hold at least one (got none)"),
        (lambda model: ["a"], "must come from mlp_group, attention_group or residual_group (got 'a')"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_a_table_that_does_not_fit(groups, said, refused):
    assert said in refused(groups)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: mlp_group("a", "a"), "mlp_group: down must be another layer than up (got 'a' for both)"),
        (
            lambda: attention_group("qkv", "qkv", "qkv", "o", 2),
            "k must be another layer than q (got 'qkv' for both); one",
        ),
        (lambda: mlp_group("a.{}", "b"), "mlp_group: all names must have as many {} (got ['a.{}', 'b'])"),
        (lambda: mlp_group("a", 3), "mlp_group: down must be the name of a module (got 3)"),
        (lambda: residual_group(""), "residual_group: layer must be the name of a module (got '')"),
        (
            lambda: attention_group("q", "k", "v", "o", 0),
            "attention_group: heads must be a positive whole number (got 0)",
        ),
        (lambda: attention_group("q", "k", "v", "o", 4, 3), "attention_group: kv_heads must divide heads, 4 (got 3)"),
        (lambda: attention_group("q", "k", "v", "o", 4, rotary="half"), "rotary must be False, True or 'interleaved'"),
    ],
)
def test_a_group_that_is_none(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


def test_a_class_that_cannot_be_registered():
    group = mlp_group("a", "b")
    with pytest.raises(ValueError, match="register: Mlp is registered already; unregister it first"):
        families.register(Mlp, [group])
    for cls in (nn.Module, int, Lone()):
        with pytest.raises(TypeError, match="register: cls must be a class of torch.nn.Module's"):
            families.register(cls, [group])
    with pytest.raises(TypeError, match="register: groups must be a list"):
        families.register(Lone, group)
    with pytest.raises(TypeError, match="register: groups must come from mlp_group, .* .got 'a'"):
        families.register(Lone, ["a"])
    with pytest.raises(TypeError, match="register: head must be a list of names .got 'a'"):
        families.register(Lone, [group], head="a")
    with pytest.raises(ValueError, match="unregister: .*Lone.* is not registered"):
        families.unregister(Lone)
    with pytest.raises(
        ValueError, match="Lone has no family .it is no transformers model.*prunekern.families.register"
    ):
        pk.attach(Lone())


def test_a_head_that_is_none(refused):
    groups = [mlp_group("a", "layers.0.down")]
    assert "head: there is no module or parameter 'nope'" in refused(groups, head=["nope"])
    assert "head: 'layers' holds 'layers.0.down', which is adapted" in refused(groups, head=["layers"])
    assert "head: 'a.weight' holds 'a', which is adapted" in refused(groups, head=["a.weight"])


def test_a_table_with_overlapping_groups():
    layers = {name: Layer(name, 4, 4, False) for name in "ab"}
    every = channels(4)
    two = {
        "a": Group("ffn", "a", every, {"b": every}),
        "b": Group("residual", "b", every),
    }
    with pytest.raises(ValueError, match="table: rows of layer 'b' must be governed by one group .* 'a' and by 'b'"):
        Table(layers, two)
    two = {name: Group("ffn", name, every, removed_cols={"b": every}) for name in "ab"}
    with pytest.raises(ValueError, match="table: columns of layer 'b' must be governed by one group"):
        Table(layers, two)


def test_what_has_no_sense_for_such_a_model(tmp_path):
    model = build(Encoder)
    pruner = attached(model)
    small = pk.compact(model)
    for call in (lambda: pruner.finalize("stock"), pruner.compare_stock, lambda: pk.save_stock(small, tmp_path / "s")):
        with pytest.raises(ValueError, match="Encoder is registered with .*rule 'stock', save_stock"):
            call()
    with pytest.raises(ValueError, match="export_onnx: model must be one of transformers .got Encoder"):
        pk.export_onnx(small, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="calibrate: small must be a model of transformers .got Encoder"):
        pk.calibrate(small, [{"ids": inputs(small)}])
    with pytest.raises(ValueError, match="attach: model is attached already"):
        pk.attach(model)
    with pytest.raises(ValueError, match="attach: model is compact already"):
        pk.attach(small)
    assert not list(tmp_path.iterdir())


def test_attach_warns_until_the_groups_were_tried_out():
    class Own(Mlp):
        pass

    families.register(Own, [mlp_group("fc1", "fc2")])
    with pytest.warns(UserWarning, match="attach: the groups that Own is registered with were never tried out"):
        pk.attach(Own(), pk.PruneConfig(rank=2))
    families.check(Own(), torch.randn(2, 13))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.attach(Own(), pk.PruneConfig(rank=2))
