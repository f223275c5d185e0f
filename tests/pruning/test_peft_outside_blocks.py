"""`from_peft` of adapters that have more than the blocks: poolers and heads, by "all-linear" or by name."""

import copy

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern import from_peft
from tests.helpers.peft_adapters import TOLERANCE, batch, build, lora_layers, with_adapter
from tests.helpers.tiny_models import difference, logits, state, unchanged

peft = pytest.importorskip("peft")

# peft #1485 and #2027: "all-linear" of a classifier has its head too, where no task is named.
CASES = [
    ("bert", "sequence", None, ["bert.pooler.dense", "classifier"]),
    ("bert", "sequence", "SEQ_CLS", ["bert.pooler.dense"]),
    ("roberta", "sequence", None, ["classifier.dense", "classifier.out_proj"]),
    ("distilbert", "sequence", None, ["pre_classifier", "classifier"]),
    ("bert", "token", None, ["classifier"]),
    ("bert", "masked_lm", None, ["cls.predictions.transform.dense"]),
    ("bert", "base", None, ["pooler.dense"]),
    ("llama", "sequence", None, ["score"]),
]


def outside(model):
    blocks = (".layer.", ".layers.", "layer.")
    return [n for n in lora_layers(model) if not n.startswith("layer.") and not any(b in n for b in blocks)]


def all_linear(family, task, name, dora, dtype=torch.float32, **options):
    model = with_adapter(build(family, task, dtype=dtype), "all-linear", dora, (), task_type=name, **options)
    for wrapper in model.modules():  # what is saved whole is trained too
        if type(wrapper).__name__ == "ModulesToSaveWrapper":
            with torch.no_grad():
                wrapper.modules_to_save["default"].weight.add_(0.3)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("family,task,name,merged", CASES)
def test_all_linear_computes_what_peft_did(family, task, name, merged, dora, dtype):
    model = all_linear(family, task, name, dora, dtype, r=4)  # more than a classifier of 3 has rows
    assert outside(model) == merged
    want, plain = logits(model, batch(family)), copy.deepcopy(model)
    with torch.no_grad():
        for layer in merged:  # and they do something
            lora_layers(plain)[layer].lora_B["default"].weight.zero_()
    assert difference(logits(plain, batch(family)), want) > 1e-3 or task == "base"
    pruner = from_peft(model, pk.PruneConfig(sparsity=0.3))
    assert difference(logits(pruner.model, batch(family)), want) < TOLERANCE[dtype]
    for layer in merged:
        assert type(pruner.model.get_submodule(layer)) is nn.Linear and layer not in pruner.layers
        assert pruner.model.get_submodule(layer).weight.requires_grad
    assert not [m for m in pruner.model.modules() if type(m).__module__.startswith("peft")]


@pytest.mark.parametrize("family,task,name,merged", [CASES[0], CASES[6]])
def test_merged_weights_come_along_on_disk(family, task, name, merged, tmp_path):
    build(family, task).save_pretrained(tmp_path / "base")
    model = all_linear(family, task, name, True)
    pruner = from_peft(model, pk.PruneConfig(sparsity=0.3))
    pruner.finalize()
    pk.save_adapter(pruner, tmp_path / "a")
    back = pk.load_adapter(build(family, task), tmp_path / "a")
    with torch.no_grad():
        want, got = (tuple(m(**batch(family)).to_tuple()) for m in (pruner.model, back.model))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    pk.compact_files(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    small = pk.load(tmp_path / "out")
    for layer in merged:
        assert torch.equal(small.get_submodule(layer).weight, pruner.model.get_submodule(layer).weight)


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_a_language_models_head(dora):
    def model(tied):
        dense = build("llama", "causal", tie_word_embeddings=tied)
        return with_adapter(dense, ["q_proj", "down_proj", "lm_head"], dora, ())

    untied = model(False)
    want = logits(untied, batch("llama"))
    pruner = from_peft(untied)
    assert difference(logits(pruner.model, batch("llama")), want) < TOLERANCE[torch.float32]
    tied = model(True)
    before = state(tied)
    with pytest.raises(
        ValueError, match=r"target 'lm_head' must have a weight of its own \(it is tied to 'model.embed"
    ):
        from_peft(tied)
    unchanged(tied, before)


def test_patterns_and_rslora_hold_outside_too():
    options = {"rank_pattern": {"classifier": 2}, "alpha_pattern": {"pooler.dense": 7}, "use_rslora": True}
    model = all_linear("bert", "sequence", None, True, **options)
    want = logits(model, batch("bert"))
    pruner = from_peft(model)
    assert difference(logits(pruner.model, batch("bert")), want) < TOLERANCE[torch.float32]
    assert pruner.config.rank == 3
