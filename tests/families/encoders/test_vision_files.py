"""Models of images and text on disk and elsewhere: files, names of old, few bits, adapters, ONNX, stock."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import prunekern as pk
import prunekern.hf  # noqa: F401  (registers the format)
from prunekern.compacting.latency import latency
from prunekern.compacting.listening import Listener, mask_of
from prunekern.compacting.walking import Walk
from prunekern.exporting.onnx import Whole
from prunekern.exporting.plain import plain_twin
from prunekern.nn import CompactLinear
from prunekern.storage.headers import read_header
from tests.helpers.equal_models import F32
from tests.helpers.tiny_models import attached, difference, prune
from tests.helpers.tiny_vision import IMAGE, batch, build, outputs


def compact(name, share=0.5, **changes):
    model = build(name, **changes)
    prune(attached(model), share, seed=1)
    return pk.compact(model)


@pytest.mark.parametrize("name", ("ViTForImageClassification", "DeiTModel", "CLIPTextModelWithProjection", "CLIPModel"))
def test_round_trip(name, tmp_path):
    """By `save` and by transformers alone, which writes ViT's parts by the names they once had."""
    small, inputs = compact(name), batch(name)
    want = outputs(small, inputs)
    pk.save(small, tmp_path / "ours")
    small.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = pk.load(tmp_path / folder)
        assert torch.equal(outputs(again, inputs), want) and pk.plan(again) == pk.plan(small)
        again = type(small).from_pretrained(tmp_path / folder)
        assert type(again) is type(small) and torch.equal(outputs(again, inputs), want)
    pk.save(again, tmp_path / "again")
    plan = pk.plan(small)
    tensors = read_header(tmp_path / "again" / "model.safetensors")
    assert {f"{layer}.weight" for layer in plan.layers} <= set(tensors)


def test_auto_classes(tmp_path):
    for name, auto, found in (
        ("ViTForImageClassification", AutoModelForImageClassification, "ViTForImageClassification"),
        ("ViTForImageClassification", AutoModel, "ViTModel"),
        ("CLIPVisionModelWithProjection", AutoModel, "CLIPVisionModel"),
        ("SiglipModel", AutoModelForZeroShotImageClassification, "SiglipModel"),
    ):
        small, folder = compact(name), tmp_path / auto.__name__ / name
        pk.save(small, folder)
        model = auto.from_pretrained(folder)
        assert type(model).__name__ == found
        assert any(isinstance(m, CompactLinear) for m in model.modules())
        with torch.no_grad():
            got, want = model(**batch(name)), small(**batch(name), output_hidden_states=True)
        if found == name:
            assert difference(outputs(model, batch(name)), outputs(small, batch(name))) <= F32
        elif "last_hidden_state" in want:
            assert torch.equal(got.last_hidden_state, want.last_hidden_state)
        else:
            assert torch.equal(got.last_hidden_state, small.vit.layernorm(want.hidden_states[-1]))


def test_a_tower_of_a_compact_pair_is_not_taken_for_a_dense_one(tmp_path):
    pk.save(compact("CLIPModel"), tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CLIPTextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("field, value, said", [
    ("text_config.num_hidden_layers", 9**9, "text_config: num_hidden_layers must be 2"),
    ("vision_config.hidden_size", 9**6, "vision_config: hidden_size must be 48, as tensor 'vision_model"),
    ("text_config.vocab_size", 5, "text_config: vocab_size must be 60"),
    ("vision_config.num_attention_heads", 2, r"attention heads must be the \[5, 4\] .*got \[5, 2\]"),
    ("text_config.intermediate_size", 9**8, "text_config: intermediate_size must be at most 72"),
    ("vision_config.image_size", 4000, "position_embedding.weight' must have shape"),
])  # fmt: skip
def test_damaged_towers_are_named(field, value, said, pair):
    file = pair / "config.json"
    config = json.loads(file.read_text())
    tower, _, name = field.partition(".")
    before = config[tower][name]
    config[tower][name] = value
    file.write_text(json.dumps(config))
    try:
        with pytest.raises(ValueError, match=said):
            pk.load(pair)
    finally:
        config[tower][name] = before
        file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a compact CLIPModel."""
    folder = tmp_path_factory.mktemp("pair") / "m"
    pk.save(compact("CLIPModel"), folder)
    return folder


# -- few bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, most", (("bf16", 0.02), ("int8", 0.05), ("int4", 0.2)))
def test_few_bits(kind, most, tmp_path):
    for name in ("ViTForImageClassification", "CLIPModel"):
        small, inputs = compact(name), batch(name, 4)
        want = outputs(small, inputs)
        found = pk.calibrate(small, [inputs], weights=kind, most_rows=32)
        assert (found.nats is None) is (name == "CLIPModel")  # which predicts no classes
        pk.save(small, tmp_path / name, weights=kind)
        again = pk.load(tmp_path / name)
        assert difference(outputs(again, inputs), want) <= most
        for layer in pk.plan(small).layers:
            ours, theirs = small.get_submodule(layer), again.get_submodule(layer)
            assert ours.weights == theirs.weights and torch.equal(ours.weight, theirs.weight)


class Heard(Listener):
    """All that a layer reads."""

    def see(self, x):
        self.seen = [*getattr(self, "seen", []), x.clone()]


def test_walking_begins_anew_in_the_other_tower():
    """What the layers of a block read when it is called by itself is what they read in the model."""
    small, inputs = compact("SiglipModel", 0.3), batch("SiglipModel", 2)  # 9 tokens, padded, and 9 patches, all there
    walk = Walk(small, [inputs], 32)
    for block in walk.blocks:
        alone, inside = (Heard(block.names.up, small.get_submodule(block.names.up), 1 << 20) for _ in range(2))
        walk.look(block, [alone])
        handle = inside.module.register_forward_pre_hook(inside.hear, with_kwargs=True)
        inside.mask = mask_of(inputs)
        with torch.no_grad():
            small(**inputs)
        handle.remove()
        torch.testing.assert_close(alone.seen[0], inside.seen[0], rtol=1e-4, atol=1e-5)
        assert len(alone.seen[0]) == (18 if "vision" in block.names.up else inputs["attention_mask"].sum())
        walk.pass_on(block)
    assert [block.first for block in walk.blocks] == [True, False, True, False, False]


# -- adapters, other runtimes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("ViTForImageClassification", "CLIPModel"))
def test_adapters_and_compacting_from_file_to_file(name, tmp_path):
    """The base has the names that it has on the hub."""
    dense = build(name)
    dense.save_pretrained(tmp_path / "base")
    old = [n for n in read_header(tmp_path / "base" / "model.safetensors") if "encoder.layer." in n]
    assert bool(old) is name.startswith("ViT")
    model = type(dense).from_pretrained(tmp_path / "base")
    pruner = attached(model)
    prune(pruner, 0.5)
    pk.save_adapter(pruner, tmp_path / "adapter")
    other = type(dense).from_pretrained(tmp_path / "base")
    pk.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(outputs(other.eval(), batch(name)), outputs(model.eval(), batch(name)))
    pk.compact_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "files")
    pk.save(pk.compact(model), tmp_path / "memory")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "files" / file).read_bytes() == (tmp_path / "memory" / file).read_bytes()


def test_onnx(tmp_path):
    """One block a tower: what images and text alone export is part of it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    one = {"num_hidden_layers": 1}
    small = compact("CLIPModel", text=one, image=one)
    pk.export_onnx(small, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "pixel_values"]
    results = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    assert [o.name for o in session.get_outputs()] == results
    for size, length in ((1, 6), (4, 11)):
        inputs = batch("CLIPModel", size, length)
        with torch.no_grad():
            want = small(**inputs)
        got = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
        for result, array in zip(results, got, strict=True):
            assert difference(torch.from_numpy(array), want[result]) <= F32


@pytest.mark.parametrize("name, results", [
    ("ViTModel", ["last_hidden_state", "pooler_output"]),
    ("CLIPTextModelWithProjection", ["text_embeds"]),
    ("DeiTForImageClassificationWithTeacher", ["logits", "cls_logits", "distillation_logits"]),
])  # fmt: skip
def test_what_an_onnx_file_would_give(name, results):
    run = Whole(plain_twin(compact(name)))
    inputs, axes = run.example()
    assert run.results(inputs) == results and list(axes) == list(inputs)
    assert len(run(*inputs.values())) == len(results)


def test_what_other_runtimes_cannot_have(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="images of one size .got Siglip2VisionModel"):
        pk.export_onnx(compact("Siglip2VisionModel"), tmp_path / "m.onnx")
    small = compact("ViTModel")
    with pytest.raises(ValueError, match="must read text.*ViTModel as the small model.*pixel_values"):
        latency({"small": small}, 1, 8)


@pytest.mark.parametrize("name, heads", (("ViTForImageClassification", 3), ("CLIPTextModel", 5)))
def test_stock(name, heads, tmp_path):
    """ViT's configs keep a width of heads of their own, CLIP's do not: there all heads stay."""
    model = build(name)
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.4))
    if name.startswith("ViT"):
        with torch.no_grad():  # one head is worth less than anything
            for carrier, mask in pruner.masks.items():
                mask.logits.fill_(1.0)
                if carrier.endswith("v_proj"):
                    mask.logits[:12] = -9.0
    pruner.finalize("stock")
    pk.save_stock(model.eval(), tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(m, CompactLinear) for m in again.modules())
    assert again.config.num_attention_heads <= heads and not hasattr(again.config, "num_key_value_heads")
    assert difference(outputs(again, batch(name)), outputs(model, batch(name))) <= F32


def test_stock_refuses_two_towers():
    pruner = pk.attach(build("CLIPModel"), pk.PruneConfig(rank=4, sparsity=0.3))
    with pytest.raises(ValueError, match="rule 'stock' needs a config of one tower .*'clip'"):
        pruner.finalize("stock")


def test_a_tower_from_a_checkpoint_of_both(tmp_path):
    """As people take CLIP's image tower off the hub: the names of the pair, prefix and all."""
    build("CLIPModel").save_pretrained(tmp_path / "pair")
    tower = CLIPVisionModel.from_pretrained(tmp_path / "pair")
    assert isinstance(tower.config, CLIPVisionConfig) and tower.config.hidden_size == IMAGE["hidden_size"]
    prune(attached(tower), 0.5)
    small = pk.compact(tower.eval())
    for save in (pk.save, lambda model, path: model.save_pretrained(path)):
        save(small, tmp_path / "small")
        assert torch.equal(
            outputs(pk.load(tmp_path / "small"), batch("CLIPVisionModel")), outputs(small, batch("CLIPVisionModel"))
        )
