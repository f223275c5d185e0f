"""ModernBERT on disk and in other formats: what is fused in transformers' files is split in ours, and whole again."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, ModernBertForTokenClassification

import prunekern as pk
from prunekern.pruning.adapter import load_base
from tests.helpers import streamed
from tests.helpers.tiny_models import attached, difference, prune, state, unchanged
from tests.helpers.tiny_modernbert import FFN, HEADS, HIDDEN, batch, build, names, reference, results


def same(got, want):
    assert difference(got, want) <= 1e-5


# -- adapters --------------------------------------------------------------------------------------------------


def test_adapter_round_trip(tmp_path):
    model = build(dtype=torch.float32)
    dense = build()
    pruner = prune(attached(model), 0.4)
    pk.save_adapter(pruner, tmp_path / "a")
    back = pk.load_adapter(dense, tmp_path / "a")
    for (name, a), b in zip(model.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert back.plan() == pruner.plan() and torch.equal(results(dense, batch()), results(model, batch()))


def test_adapter_of_another_base_is_refused_and_leaves_the_model(tmp_path):
    pk.save_adapter(prune(attached(build()), 0.4), tmp_path / "a")
    for change in ("attn.Wqkv.weight", "mlp.Wi.bias"):
        other = build()
        with torch.no_grad():
            other.get_parameter(f"model.layers.1.{change}")[-1] += 3.0  # of v, or of up
        before, modules = state(other), dict(other.named_modules())
        with pytest.raises(ValueError, match="another base model"):
            pk.load_adapter(other, tmp_path / "a")
        unchanged(other, before)
        assert all(modules[n] is m for n, m in other.named_modules())


@pytest.mark.parametrize("task", ["token", "masked_lm", "base"])
def test_files_are_compacted_as_the_model_is(task, tmp_path):
    """`compact_files` reads rows of fused tensors; with and without the base model's prefix; in several shards."""
    model = build(task)
    model.config.dtype = torch.float32
    pruner = streamed.on_disk(tmp_path, model, "10KB")
    assert len(list((tmp_path / "base").glob("model-*"))) > 2
    stored = streamed.tensors(tmp_path / "base")
    assert any(n.endswith("attn.Wqkv.weight") for n in stored) and not any("Wqkv.q" in n for n in stored)
    small = pk.compact(pruner.model)
    pk.save(small, tmp_path / "want")
    assert streamed.run(tmp_path) == pk.plan(small)
    want, got = streamed.tensors(tmp_path / "want"), streamed.tensors(tmp_path / "out")
    assert want.keys() == got.keys() and all(torch.equal(t, got[n]) for n, t in want.items())
    back = load_base(tmp_path / "base", tmp_path / "adapter")
    pk.load_adapter(back, tmp_path / "adapter")
    same(results(pk.compact(back), batch()), results(small, batch()))


def test_files_of_a_base_model_without_its_prefix(tmp_path):
    build("token").model.save_pretrained(tmp_path / "base")
    dense = build("token")
    dense.config.dtype = torch.float32
    pk.save_adapter(streamed.trained(dense), tmp_path / "adapter")
    small = pk.compact(dense)
    # The head is the adapter's.
    assert streamed.run(tmp_path) == pk.plan(small)
    same(results(pk.load(tmp_path / "out"), batch()), results(small, batch()))


def test_damaged_sizes_are_refused_by_name(tmp_path):
    pk.save(pk.compact(prune(attached(build()), 0.4).model), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    good = json.loads(file.read_text())
    for field, value in (("vocab_size", 10**9), ("hidden_size", 96), ("num_hidden_layers", 10**6), ("num_labels", 0)):
        file.write_text(json.dumps(good | {field: value}))
        with pytest.raises(ValueError, match=field if field != "num_labels" else "num_labels|classifier"):
            pk.load(tmp_path / "m")


# -- other formats ---------------------------------------------------------------------------------------------


def test_stock_checkpoint_is_fused_again(tmp_path):
    model = build(dtype=torch.float32)
    pruner = attached(model, sparsity=0.3, align=8)
    pruner.finalize("stock")
    small = pk.compact(model)
    pk.save_stock(model, tmp_path / "a")
    pk.save_stock(small, tmp_path / "b")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert not any(".q." in n or ".gate." in n for n in stored)
    width = json.loads((tmp_path / "a" / "config.json").read_text())["intermediate_size"]
    assert width < FFN and stored["model.layers.0.mlp.Wi.weight"].shape == (2 * width, HIDDEN)
    for folder in "ab":
        back, info = ModernBertForTokenClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert type(back.model.layers[0].attn.Wqkv) is torch.nn.Linear
        same(results(back.eval(), batch()), results(model, batch()))
    with pytest.raises(ValueError, match=f"keeps 3 of {HEADS} heads"):
        kept = np.ones(HIDDEN, bool)
        kept[:12] = False
        other = attached(build())
        for layer in range(2):
            for mask_name, on in ((names(layer)["v"], kept),):
                with torch.no_grad():
                    other.masks[mask_name].logits.copy_(torch.where(torch.as_tensor(on), 1.0, -1.0))
        for name, mask in other.masks.items():
            if not name.endswith(".v"):
                with torch.no_grad():
                    mask.logits.fill_(1.0)
        pk.save_stock(other.model, tmp_path / "c")


def test_masked_models_save_the_dense_weights_as_transformers_names_them(tmp_path):
    """`save_pretrained` of an attached model: the frozen weights, fused; what is trained besides is reported."""
    model = build()
    dense = {n: t.clone() for n, t in model.state_dict().items()}
    attached(model)
    model.save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(stored[n], t) for n, t in dense.items() if "classifier" not in n)
    assert not any(n.endswith(("q.weight", "q.bias", "gate.weight")) for n in stored)
    _, info = AutoModelForTokenClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    small = pk.compact(model)
    pk.save(small, tmp_path / "small")
    assert any(n.endswith("Wqkv.q.weight") for n in load_file(tmp_path / "small" / "model.safetensors"))


def test_onnx(tmp_path):
    """Lengths within the window and beyond it, padded."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    small = pk.compact(prune(attached(build()), 0.4).model)
    pk.export_onnx(small, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for size, length in ((2, 13), (3, 4), (1, 21)):
        inputs = batch(size, length)
        got = session.run(None, {n: t.numpy() for n, t in inputs.items()})[0]
        with torch.no_grad():
            want = small(**inputs).logits
        real = inputs["attention_mask"].bool()
        assert difference(torch.as_tensor(got)[real], want[real]) <= 1e-4


@pytest.mark.parametrize("share,plain", [(0.0, True), (0.4, False), (0.97, True), (1.0, False)])
def test_plain_twin(share, plain):
    small = pk.compact(prune(attached(build("sequence", plain=plain)), share).model)
    twin = pk.plain_twin(small)
    assert not any(isinstance(m, pk.nn.CompactLinear) for m in twin.modules())
    same(results(twin, batch()), results(small, batch()))


def test_onnx_refuses_positions_that_depend_on_the_length(tmp_path):
    pytest.importorskip("onnxscript")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0}
    rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    small = pk.compact(prune(attached(build(rope_parameters=rope)), 0.4).model)
    with pytest.raises(ValueError, match="rope_type .*'dynamic'"):
        pk.export_onnx(small, tmp_path / "m.onnx")


# -- PEFT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_peft_adapters_of_fused_linears(dora):
    """The parts share A; rows of B and of the magnitudes are theirs. Exactly what PEFT computes."""
    adapters = pytest.importorskip("tests.helpers.peft_adapters")
    targets = ["Wqkv", "Wi", "attn.Wo"]
    theirs = adapters.with_adapter(build(dtype=torch.float64), targets, dora)
    want = results(theirs, batch())
    pruner = pk.from_peft(theirs, pk.PruneConfig(sparsity=0.3))
    assert difference(results(pruner.model, batch()), want) <= 1e-12
    layer = pruner.layers
    assert torch.equal(layer[names()["q"]].A, layer[names()["v"]].A) and pruner.config.rank == 3
    prune(pruner, 0.4)
    small = pk.compact(pruner.model)
    assert difference(results(small, batch()), results(reference(pruner.model), batch())) <= 1e-10


def test_peft_refusals():
    adapters = pytest.importorskip("tests.helpers.peft_adapters")
    theirs = adapters.with_adapter(build(), ["Wqkv"], True)
    before = {n: p.detach().clone() for n, p in theirs.named_parameters()}
    with pytest.raises(ValueError, match=r"'model.layers.0.attn.Wqkv.k', which config does not adapt"):
        pk.from_peft(theirs, pk.PruneConfig(preset="paper", sparsity=0.1))
    assert all(torch.equal(p, before[n]) for n, p in theirs.named_parameters())


def test_to_peft_refuses_parts_of_fused_linears(tmp_path):
    PeftModel = pytest.importorskip("peft").PeftModel
    pruner = prune(attached(build(), sparsity=0.0), 0.0)
    with pytest.raises(ValueError, match=r"'model.layers.0.attn.Wqkv.q' must be a linear of transformers' model"):
        pk.to_peft(pruner, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    only = prune(attached(build(), sparsity=0.0, targets=["mlp.Wo"]), 0.0)
    pk.to_peft(only, tmp_path / "p")  # of what is a linear there, too
    same(results(PeftModel.from_pretrained(build(), tmp_path / "p").eval(), batch()), results(only.model, batch()))
