"""Files in few bits in the hands of transformers: other classes, dtypes, configs, devices, and heads that follow."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import prunekern as pk
from prunekern.compacting.head import word_head
from prunekern.nn import CompactLinear
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.few_bits import assert_same, decoder, held
from tests.helpers.tiny_models import logits

FEW = ("bf16", "int8", "int4")


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


@pytest.mark.parametrize("make", [small_model, lambda: decoder(False)])
@pytest.mark.parametrize("grads", [True, False])
def test_offload_that_loses_codes_is_refused(make, grads, tmp_path):
    """accelerate keeps what `state_dict()` holds, and casts it to the parameter's dtype when it is used."""
    accelerate = pytest.importorskip("accelerate")
    pk.save(make(), tmp_path / "m", weights="int8")
    for offload in (accelerate.cpu_offload, lambda *a, **k: accelerate.disk_offload(*a, tmp_path / "off", **k)):
        small = pk.load(tmp_path / "m")
        offload(small, execution_device="cpu")
        small.get_input_embeddings().weight.requires_grad_(grads)
        with pytest.raises(ValueError, match="weights must be fp32 or bf16 where accelerate offloads them"):
            small(input_ids=torch.arange(5)[None])
