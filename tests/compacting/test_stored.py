"""Files in few bits: as small as their bits say, and loaded to the last bit as fp32 files are in these kinds."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import prunekern as pk
from prunekern.compacting.card import model_card
from prunekern.compacting.checkpoint import set_weights, weights_of
from prunekern.compacting.head import word_head
from prunekern.nn import CompactLinear
from prunekern.ops import quantize_weight
from prunekern.ops.int4 import dequantize_weight_int4
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.on_disk import content, edit_json
from tests.helpers.tiny_models import attached, batch, logits, names, prune

FEW = ("bf16", "int8", "int4")
UP, Q = names("distilbert", 1)["up"], names("distilbert", 0)["q"]


def decoder(tied, family="llama", share=0.5, **options):
    model = tiny_decoders.build(family, tie_word_embeddings=tied, **options)
    prune(attached(model), share)
    return pk.compact(model)


MODELS = {
    "encoder": small_model,
    "masked_lm": lambda: small_model("bert", "masked_lm"),
    "base": lambda: small_model("roberta", "base"),
    "tied": lambda: decoder(True),
    "untied": lambda: decoder(False, "qwen3"),
    "scores": lambda: decoder(False, task="sequence"),
    "nothing left": lambda: small_model(share=1.0),
}


def held(model):
    """Kind, weight and scale of every compact layer, the head too."""
    return {
        name: (m.weights, m.weight.detach().clone(), m.scale)
        for name, m in model.named_modules()
        if isinstance(m, CompactLinear)
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, (kind, weight, scale) in one.items():
        assert kind == other[name][0] and weight.dtype == other[name][1].dtype, name
        assert torch.equal(weight, other[name][1]), name
        assert (scale is None) == (other[name][2] is None), name
        assert scale is None or (torch.equal(scale, other[name][2]) and scale.dtype == other[name][2].dtype), name


def tensors(folder):
    return load_file(folder / "model.safetensors")


def edit(folder, change):
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def inputs_of(model):
    return tiny_decoders.batch() if "Llama" in type(model).__name__ or "Qwen" in type(model).__name__ else batch(8)


# -- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("which", MODELS)
def test_layers_are_those_of_an_fp32_file_in_this_kind(which, kind, tmp_path):
    small = MODELS[which]()
    before = held(small), {name: t.clone() for name, t in small.state_dict().items()}
    pk.save(small, tmp_path / "plain")
    pk.save(small, tmp_path / "few", weights=kind)
    assert_same(held(small), before[0])  # what is saved stays as it is
    assert all(torch.equal(t, before[1][name]) for name, t in small.state_dict().items())
    want, got, auto = pk.load(tmp_path / "plain", kind), pk.load(tmp_path / "few"), pk.load(tmp_path / "few", kind)
    assert_same(held(got), held(want))
    assert_same(held(auto), held(want))
    auto = type(small).from_pretrained(tmp_path / "few")
    assert_same(held(auto), held(want))
    if which != "base":
        assert torch.equal(logits(auto, inputs_of(small)), logits(got, inputs_of(small)))
    plain = got.state_dict()  # of floating-point numbers, and nothing else
    assert plain.keys() == want.state_dict().keys() and all(t.is_floating_point() for t in plain.values())
    for name, parameter in got.named_parameters():  # norms and biases are whole
        if "norm" in name.lower() or name.endswith("bias"):
            assert torch.equal(parameter, small.get_parameter(name)), name
    pk.save(got, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "few")
    pk.save(copy.deepcopy(auto), tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "few")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_kinds_are_made_of_the_rounded_weights(tied, kind, tmp_path):
    small = decoder(tied)
    pk.save(small, tmp_path / "few", weights=kind)
    few = pk.load(tmp_path / "few")
    for other in ("fp32", "bf16", "int8", "int4"):
        back = pk.load(tmp_path / "few", weights=other)
        twin = copy.deepcopy(few)
        for layer in twin.modules():
            if isinstance(layer, CompactLinear) and layer is not word_head(twin):
                assert torch.equal(layer.set_weights("fp32").weight, layer.plain_weight())
        set_weights(twin, other)
        if other != kind:
            assert_same(held(back), held(twin))
        assert weights_of(back) == word_head(back).weights == other
        pk.save(back, tmp_path / "saved")  # asked for in another kind: no few-bit file any more
        stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert ("stored" in stored) == (other == kind) and stored["format"] == (3 if other == kind else 1)
    fp32 = pk.load(tmp_path / "few", weights="fp32")
    for name, layer in few.named_modules():
        if isinstance(layer, CompactLinear):
            assert torch.equal(fp32.get_submodule(name).weight, layer.plain_weight()), name


def test_what_none_means(tmp_path):
    """Plain values, but for what was loaded from few-bit files."""
    small = small_model()
    set_weights(small, "int8")
    pk.save(small, tmp_path / "m")
    assert tensors(tmp_path / "m")[f"{UP}.weight"].dtype == torch.float32
    assert pk.load(tmp_path / "m").get_submodule(UP).weights == "fp32"
    pk.save(small, tmp_path / "m", weights="int8")
    assert_same(held(pk.load(tmp_path / "m")), held(small))
    back = pk.load(tmp_path / "m")
    back.save_pretrained(tmp_path / "theirs")  # what state_dict() holds
    assert tensors(tmp_path / "theirs")[f"{UP}.weight"].dtype == torch.float32
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert "stored" not in config and config["format"] == 1
    assert torch.equal(pk.load(tmp_path / "theirs").get_submodule(UP).weight, back.get_submodule(UP).plain_weight())
    set_weights(small, "bf16")
    pk.save(small, tmp_path / "m", weights="fp32")
    assert {t.dtype for t in tensors(tmp_path / "m").values()} == {torch.float32}
    with pytest.raises(ValueError, match="save: weights must be one of .*got 'int3'"):
        pk.save(small, tmp_path / "m", weights="int3")


# -- on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, most", [("bf16", 2.0), ("int8", 1.02), ("int4", 0.58)])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes(tied, kind, most, tmp_path):
    sizes = {"hidden_size": 640, "head_dim": 64, "num_attention_heads": 10, "num_key_value_heads": 5}
    small = decoder(tied, layers=1, share=0.2, vocab_size=512, intermediate_size=1280, **sizes)
    pk.save(small, tmp_path / "m", weights=kind)
    stored = tensors(tmp_path / "m")

    def size(name):
        parts = [stored[n] for n in (f"{name}.weight", f"{name}.scale") if n in stored]
        return sum(t.numel() * t.element_size() for t in parts)

    blocks = sum(size(name) for name in pk.plan(small).layers)
    assert blocks <= most * pk.plan(small).params()
    table, head = size("model.embed_tokens"), size("lm_head")
    if tied:  # once
        assert head == 0 and table <= most * 512 * 640
    else:
        assert head <= most * 512 * 640 and table == 2 * 512 * 640
    rest = sum(t.numel() * 4 for n, t in stored.items() if "norm" in n or n.endswith("bias"))
    assert (tmp_path / "m" / "model.safetensors").stat().st_size <= blocks + table + head + rest + 8000


def test_what_files_hold(tmp_path):
    small = small_model()
    pk.save(small, tmp_path / "m", weights="int8")
    stored, layer = tensors(tmp_path / "m"), small.get_submodule(UP)
    q, scale = quantize_weight(layer.weight)
    assert torch.equal(stored[f"{UP}.weight"], q) and torch.equal(stored[f"{UP}.scale"], scale)
    assert stored[f"{UP}.bias"].dtype == torch.float32
    words = "distilbert.embeddings.word_embeddings.weight"
    assert torch.equal(stored[words], small.state_dict()[words].bfloat16())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["format"] == 3
    assert config["quantization_config"]["stored"] == {
        "weights": "int8", "layers": {}, "head": None, "embeddings": "bf16",
    }  # fmt: skip
    assert config["dtype"] == "float32"
    pk.save(decoder(True), tmp_path / "m", weights="int4")
    stored = tensors(tmp_path / "m")
    codes, scale = stored["model.embed_tokens.weight"], stored["model.embed_tokens.scale"]
    assert codes.dtype == torch.uint8 and codes.shape[1] == 16 * 3 and scale.dtype == torch.float16
    back = pk.load(tmp_path / "m")
    values = dequantize_weight_int4(codes, scale, tiny_decoders.HIDDEN)
    assert torch.equal(back.get_input_embeddings().weight, values)


def test_tied_embeddings_lose_what_rounding_does(tmp_path):
    small = decoder(True)
    table = small.get_input_embeddings().weight
    for kind, least in (("bf16", 50), ("int8", 40), ("int4", 19)):
        pk.save(small, tmp_path / "m", weights=kind)
        back = pk.load(tmp_path / "m").get_input_embeddings().weight
        assert 20 * math.log10(table.norm() / (back - table).norm()) > least


def test_shards(tmp_path):
    small = decoder(True)
    pk.save(small, tmp_path / "one", weights="int8")
    pk.save(small, tmp_path / "many", max_shard_size="20KB", weights="int8")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    assert_same(held(pk.load(tmp_path / "many")), held(pk.load(tmp_path / "one")))
    name = "model.layers.1.mlp.up_proj.scale"
    file = next(file for file in files if name in load_file(file))
    damaged = load_file(file)
    damaged[name][3] = -1.0
    save_file(damaged, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{file.name}: tensor '{name}' must be finite and not negative"):
        pk.load(tmp_path / "many")


def test_layers_held_in_more_bits_are_stored_so(tmp_path):
    small = small_model()
    some = [batch(8, seed=seed) for seed in range(3)]
    losses = sorted(loss.db for loss in pk.calibrate(copy.deepcopy(small), some, least_db=0.0).layers)
    report = pk.calibrate(small, some, least_db=losses[len(losses) // 2], hold=False)
    assert report.held and len(report.held) < len(report.layers)
    pk.save(small, tmp_path / "plain")
    pk.save(small, tmp_path / "few", weights="int8")
    stored = tensors(tmp_path / "few")
    for name in pk.plan(small).layers:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(report.held.get(name), torch.int8)
        assert stored[f"{name}.weight"].dtype == dtype, name
    got = pk.load(tmp_path / "few")
    assert_same(held(got), held(pk.load(tmp_path / "plain", weights="int8")))
    pk.save(got, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "few")
    card = (tmp_path / "few" / "README.md").read_text()
    assert "stored in `int8`" in card and "held in more bits" in card


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_held_in_more_bits_is_stored_so(tied, tmp_path):
    small = decoder(tied)
    some = [tiny_decoders.batch(seed=seed) for seed in range(3)]
    db = pk.calibrate(copy.deepcopy(small), some, least_db=0.0).layers[-1].db
    report = pk.calibrate(small, some, least_db=db + 0.1, hold=False)
    assert report.held["lm_head"] == "bf16"
    pk.save(small, tmp_path / "plain")
    pk.save(small, tmp_path / "few", weights="int8")
    head = tensors(tmp_path / "few")["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert head.dtype == torch.bfloat16
    got = pk.load(tmp_path / "few")
    assert word_head(got).weights == "bf16"
    assert_same(held(got), held(pk.load(tmp_path / "plain", weights="int8")))
    pk.save(got, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "few")


def test_the_card_counts_numbers_not_bytes(tmp_path):
    for tied in (True, False):
        small = decoder(tied)
        pk.save(small, tmp_path / "m", weights="int4")
        total = next(line for line in model_card(small).splitlines() if line.startswith("| parameters"))
        assert total in model_card(pk.load(tmp_path / "m"))
        (tmp_path / "m" / "README.md").unlink(missing_ok=True)


# -- transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW)
def test_other_classes_and_dtypes(kind, tmp_path):
    small = decoder(True)
    pk.save(small, tmp_path / "m", weights=kind)
    base, whole = AutoModel.from_pretrained(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(base.embed_tokens.weight, whole.model.embed_tokens.weight)
    inputs = tiny_decoders.batch()
    assert torch.equal(base(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state)
    pk.save(base, tmp_path / "base")
    assert_same(held(pk.load(tmp_path / "base")), held(base))
    scores = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", num_labels=3)
    assert_same({n.removeprefix("model."): v for n, v in held(scores).items()}, held(base))
    for dtype in (torch.bfloat16, torch.float64):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        assert other.model.norm.weight.dtype == other.model.embed_tokens.weight.dtype == dtype
        layer = other.model.layers[0].mlp.up_proj
        assert layer.weights == (kind if kind != "bf16" or dtype == torch.bfloat16 else "float64")
        assert layer.scale is None or layer.scale.dtype == (torch.float32 if kind == "int8" else torch.float16)
    words = small_model("bert", "masked_lm")
    pk.save(words, tmp_path / "words", weights=kind)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "words")
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("kind", FEW)
def test_config_and_state_dict_of_a_loaded_model(kind, tmp_path):
    pk.save(decoder(True), tmp_path / "m", weights=kind)
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    if kind != "bf16":
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "m", config=one.config)
        assert_same(held(other), held(one))
    plain = {n: t.float() for n, t in one.state_dict().items()}
    other = type(one).from_pretrained(None, config=one.config, state_dict=plain)
    name = tiny_decoders.names()["up"]
    assert torch.equal(other.get_submodule(name).weight, one.get_submodule(name).plain_weight().float())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_head_follows_its_embeddings(kind, tmp_path):
    pk.save(decoder(True), tmp_path / "m", weights=kind)
    small = pk.load(tmp_path / "m")
    inputs = tiny_decoders.batch()
    before = logits(small, inputs)
    with torch.no_grad():
        small.get_input_embeddings().weight.mul_(2.0)  # a norm follows: all but the head forgets the factor
    assert not torch.allclose(logits(small, inputs), before)
    pk.save(small, tmp_path / "again")
    table = pk.load(tmp_path / "again").get_input_embeddings().weight
    error = (table - small.get_input_embeddings().weight).norm() / table.norm()
    assert error < 1e-6  # rounded already: it stays so
    small.resize_token_embeddings(tiny_decoders.VOCAB + 3)
    assert word_head(small).weights == kind and word_head(small).weight.shape[0] == tiny_decoders.VOCAB + 3


@pytest.mark.parametrize("kind", FEW)
def test_a_device_map_and_activations(kind, tmp_path):
    pk.save(decoder(True), tmp_path / "m", weights=kind)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map={"": "cpu"})
    assert_same(held(mapped), held(pk.load(tmp_path / "m")))
    if kind == "bf16":
        with pytest.raises(ValueError, match="activations must be auto or float with bf16 weights"):
            pk.load(tmp_path / "m", activations="int8")
    else:
        back = pk.load(tmp_path / "m", activations="int8")
        assert {m.activations for m in back.modules() if isinstance(m, CompactLinear)} == {"int8"}


def test_disk_offload_is_refused(tmp_path):
    pk.save(small_model(), tmp_path / "m", weights="int8")
    where = {"distilbert.embeddings": "cpu", "distilbert.transformer": "disk", "pre_classifier": "cpu"}
    with pytest.raises(ValueError, match="device_map must put no layer on disk"):
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "m", device_map=where | {"classifier": "cpu"}, offload_folder=tmp_path / "off"
        )


def test_no_layer_is_ever_there_in_fp32(tmp_path, monkeypatch):
    """Neither where files are written of what is held in their kind, nor where they are read."""
    small = set_weights(decoder(False), "int8")
    plain = CompactLinear.plain_weight

    def on_meta(layer):
        assert layer.weight.is_meta, "a plain weight is made"
        return plain(layer)

    monkeypatch.setattr(CompactLinear, "plain_weight", on_meta)
    pk.save(small, tmp_path / "m", weights="int8")
    assert weights_of(pk.load(tmp_path / "m")) == "int8"


# -- what is wrong with files ------------------------------------------------------------------------------------


def put(name, at, value):
    def change(held):
        held[name][at] = value

    return change


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("int8", lambda t: t.pop(f"{UP}.scale"), f"model.safetensors: tensor '{UP}.scale' is missing"),
        ("int4", lambda t: t.pop(f"{UP}.scale"), f"model.safetensors: tensor '{UP}.scale' is missing"),
        ("int8", lambda t: t.pop(f"{UP}.weight"), f"model.safetensors: tensor '{UP}.weight' is missing"),
        ("int8", lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"][1:].clone()}), f"'{UP}.scale' must have shape"),
        ("int4", lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"][:, 1:].clone()}), f"'{UP}.scale' must have shape"),
        ("int8", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][1:].clone()}), f"'{UP}.weight' must have shape"),
        ("int4", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:, 1:].clone()}), "must have shape"),
        ("int8", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), f"'{UP}.weight' must be I8 by"),
        ("bf16", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].float()}), f"'{UP}.weight' must be BF16 by"),
        ("int8", lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"].half()}), f"'{UP}.scale' must be F32 by"),
        ("int4", lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"].float()}), f"'{UP}.scale' must be F16 by"),
        ("int8", put(f"{Q}.scale", 2, math.nan), rf"'{Q}.scale' must be finite and not negative \(got nan at \[2\]\)"),
        ("int8", put(f"{Q}.scale", 2, math.inf), f"model.safetensors: tensor '{Q}.scale' must be finite and not negat"),
        ("int8", put(f"{Q}.scale", 2, -0.5), rf"'{Q}.scale' must be finite and not negative \(got -0.5 at \[2\]\)"),
        ("int4", put(f"{Q}.scale", (2, 1), math.nan), rf"tensor '{Q}.scale' must be finite \(got nan at \[2, 1\]\)"),
        ("int8", put(f"{Q}.weight", (1, 1), -128), rf"tensor '{Q}.weight' must be -127 to 127 \(got -128\)"),
        ("int8", lambda t: t.update({"classifier.scale": torch.ones(3)}), "tensor 'classifier.scale' is not of this"),
    ],
)
def test_damaged_tensors(kind, change, message, tmp_path):
    pk.save(small_model(), tmp_path / "m", weights=kind)
    edit(tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        pk.load(tmp_path / "m")


@pytest.mark.parametrize("tied, name", [(True, "model.embed_tokens"), (False, "lm_head")])
def test_damaged_heads(tied, name, tmp_path):
    small = decoder(tied)
    for change, message in (
        (lambda t: t.pop(f"{name}.scale"), f"tensor '{name}.scale' is missing"),
        (put(f"{name}.scale", 5, math.nan), f"tensor '{name}.scale' must be finite"),
        (lambda t: t.update({f"{name}.weight": t[f"{name}.weight"].float()}), f"'{name}.weight' must be I8"),
        (lambda t: t.update({f"{name}.scale": t[f"{name}.scale"][:-1].clone()}), f"'{name}.scale' must have shape"),
    ):
        pk.save(small, tmp_path / "m", weights="int8")
        edit(tmp_path / "m", change)
        with pytest.raises(ValueError, match=message):
            pk.load(tmp_path / "m")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.update(stored="int8"), "stored: must be a mapping with weights, layers, head, embeddings"),
        (lambda s: s["stored"].pop("head"), "stored: must be a mapping with weights, layers, head, embeddings"),
        (lambda s: s["stored"].update(weights="int3"), "stored: weights must be one of .*got 'int3'"),
        (lambda s: s["stored"].update(layers={UP: "int2"}), f"stored: layer '{UP}' must be one of"),
        (lambda s: s["stored"].update(layers={"up": "bf16"}), "stored: layer 'up' is not in the plan"),
        (
            lambda s: s["stored"].update(layers={UP: "bf16"}),
            f"tensor '{UP}.weight' must be BF16 by quantization_config",
        ),
        (lambda s: s["stored"].update(embeddings="int8"), "stored: embeddings must be fp32, bf16, or as the head is"),
        (lambda s: s["stored"].update(weights="int4"), r"tensor '.*' must have shape"),
    ],
)
def test_edited_configs(change, message, tmp_path):
    pk.save(small_model(), tmp_path / "m", weights="int8")
    edit_json(tmp_path / "m" / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(ValueError, match=message):
        pk.load(tmp_path / "m")


def test_weights_that_are_not_finite_are_not_stored(tmp_path):
    small = small_model()
    small.get_submodule(UP).weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="weight must be finite"):
        pk.save(small, tmp_path / "m", weights="int8")
    assert not (tmp_path / "m").exists()


def test_every_embedding_is_read_back_in_the_models_dtype(tmp_path):
    pk.save(small_model("roberta"), tmp_path / "m", weights="int4")
    back = pk.load(tmp_path / "m")
    tables = [m.weight for m in back.modules() if isinstance(m, nn.Embedding)]
    assert len(tables) == 3 and {t.dtype for t in tables} == {torch.float32}
    assert all(torch.equal(t, t.bfloat16().float()) for t in tables)
