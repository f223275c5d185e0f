"""Files in few bits: as small as their bits say, and loaded to the last bit as fp32 files are in these kinds."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunekern as pk
from prunekern.compacting.card import model_card
from prunekern.compacting.checkpoint import set_weights, weights_of
from prunekern.compacting.head import word_head
from prunekern.nn import CompactLinear
from prunekern.ops import quantize_weight
from prunekern.ops.int4 import dequantize_weight_int4
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.few_bits import assert_same, decoder, held, tensors
from tests.helpers.on_disk import content
from tests.helpers.tiny_models import batch, logits, names

FEW = ("bf16", "int8", "int4")
UP = names("distilbert", 1)["up"]

MODELS = {
    "encoder": small_model,
    "masked_lm": lambda: small_model("bert", "masked_lm"),
    "base": lambda: small_model("roberta", "base"),
    "tied": lambda: decoder(True),
    "untied": lambda: decoder(False, "qwen3"),
    "scores": lambda: decoder(False, task="sequence"),
    "nothing left": lambda: small_model(share=1.0),
}


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


def test_every_embedding_is_read_back_in_the_models_dtype(tmp_path):
    pk.save(small_model("roberta"), tmp_path / "m", weights="int4")
    back = pk.load(tmp_path / "m")
    tables = [m.weight for m in back.modules() if isinstance(m, nn.Embedding)]
    assert len(tables) == 3 and {t.dtype for t in tables} == {torch.float32}
    assert all(torch.equal(t, t.bfloat16().float()) for t in tables)
