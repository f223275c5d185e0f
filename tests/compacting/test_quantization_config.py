"""`PrunekernConfig` wherever transformers takes a quantization_config: of another model, an argument, a dict."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

import prunekern as pk
from prunekern.hf import PrunekernConfig
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import batch, build, logits, names

Auto = AutoModelForSequenceClassification


@pytest.fixture(scope="module")
def small():
    return small_model()


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "m"
    pk.save(small, path)
    return path


def equal(model, small):
    assert type(model) is type(small) and pk.plan(model) == pk.plan(small)
    assert torch.equal(logits(model, batch()), logits(small, batch()))


# -- from_pretrained -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["compact", "copied", "loaded", "file"])
def test_config_of_another_model(of, small, folder):
    configs = {
        "compact": lambda: small.config,
        "copied": lambda: copy.deepcopy(small.config),
        "loaded": lambda: pk.load(folder).config,
        "file": lambda: AutoConfig.from_pretrained(folder),
    }
    equal(Auto.from_pretrained(folder, config=configs[of]()), small)


def test_config_handed_over_stays_as_it_was(small, folder):
    """The base model's layers have other names; the config it was given is still the other model's."""
    before = small.config.to_json_string()
    section = small.config.quantization_config
    for options in ({"config": small.config}, {"quantization_config": section}):
        base = AutoModel.from_pretrained(folder, **options)
        assert set(pk.plan(base).layers) == {n for i in range(2) for n in names("distilbert", i, "base").values()}
        assert small.config.to_json_string() == before and small.config.quantization_config is section
    want = PrunekernConfig(**section.to_dict())
    small.config.quantization_config.to_dict()["plan"]["layers"].clear()
    assert section == want


def test_state_dict(small):
    model = type(small).from_pretrained(None, config=small.config, state_dict=small.state_dict())
    equal(model.eval(), small)


@pytest.mark.parametrize("as_dict", [False, True])
def test_plan_as_an_argument(as_dict, small, tmp_path):
    """The folder's own config.json knows of no plan."""
    small.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    section = PrunekernConfig(**config.pop("quantization_config"))
    file.write_text(json.dumps(config))
    equal(Auto.from_pretrained(tmp_path, quantization_config=section.to_dict() if as_dict else section), small)


def test_plan_as_an_argument_besides_the_file(small, folder):
    with pytest.warns(UserWarning, match="quantization_config` from the model will be used"):
        equal(Auto.from_pretrained(folder, quantization_config=small.config.quantization_config), small)


def test_plan_for_a_dense_checkpoint_is_refused(small, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have shape \[.*\] by the plan \(got \[48, 48\]\)"):
        Auto.from_pretrained(tmp_path, quantization_config=small.config.quantization_config)


def test_auto_classes_of_quantizers(small, folder):
    section = AutoQuantizationConfig.from_pretrained(folder)
    assert type(section) is PrunekernConfig and section == small.config.quantization_config
    for quantizer in (AutoHfQuantizer.from_pretrained(folder), AutoHfQuantizer.from_config(section)):
        assert quantizer.is_serializable() and quantizer.is_trainable and not quantizer.is_qat_trainable
    assert AutoHfQuantizer.supports_quant_method(section)
    assert AutoHfQuantizer.supports_quant_method(section.to_dict())


# -- the config by itself --------------------------------------------------------------------------------------


def test_reads_as_a_mapping(small):
    section = small.config.quantization_config
    plain = section.to_dict()
    assert dict(section) == plain == {**section} == dict(section.items())
    assert list(section.keys()) == list(plain) and list(section.values()) == list(plain.values())
    assert section.get("quant_method") == section["quant_method"] == "prunekern"
    assert section.get("bits") is None and section.get("bits", 4) == 4
    assert "plan" in section and "bits" not in section and len(section) == len(plain)
    with pytest.raises(KeyError, match="bits"):
        section["bits"]
    assert section.update(bits=4) == {"bits": 4} and section == PrunekernConfig(**plain)


def test_equal_where_the_plan_is(small):
    section = small.config.quantization_config
    assert section == copy.deepcopy(section) == pickle.loads(pickle.dumps(section))
    assert section != PrunekernConfig(plan=pk.plan(small_model(share=0.2)).to_dict())
    assert copy.deepcopy(small.config) == small.config
    again, unused = PrunekernConfig.from_dict(section.to_dict(), return_unused_kwargs=True, bits=4)
    assert again == section and unused == {"bits": 4}


def test_written_and_read(small, tmp_path):
    section = small.config.quantization_config
    texts = small.config.to_json_string(), small.config.to_json_string(use_diff=False)
    dicts = [small.config.to_dict(), small.config.to_diff_dict(), *map(json.loads, texts)]
    assert all(d["quantization_config"] == section.to_dict() for d in dicts)
    section.to_json_file(tmp_path / "section.json")
    assert json.loads((tmp_path / "section.json").read_text()) == json.loads(section.to_json_string()) == dict(section)
    small.config.save_pretrained(tmp_path)
    for _ in range(2):  # and what was read is written again
        back = AutoConfig.from_pretrained(tmp_path)
        assert PrunekernConfig(**back.quantization_config) == section
        back.save_pretrained(tmp_path)
    assert '"quant_method": "prunekern"' in repr(section) and repr(small.config)


# -- a model with it -------------------------------------------------------------------------------------------


def test_what_is_loaded_says_it_is_no_quantised_model(small, folder):
    model = Auto.from_pretrained(folder, config=small.config)
    assert not model.is_quantized and model.hf_quantizer is None and model.quantization_method == "prunekern"
    with pytest.raises(ValueError, match="need to first quantize"):
        model.dequantize()
    equal(copy.deepcopy(model), small)
    equal(model.to("cpu", torch.float64).float(), small)


def test_saved_again(small, folder, tmp_path):
    model = Auto.from_pretrained(folder, config=small.config)
    for options in ({}, {"state_dict": model.state_dict()}):
        model.save_pretrained(tmp_path / "m", **options)
        equal(Auto.from_pretrained(tmp_path / "m"), small)


def test_a_dense_model_of_a_compact_config_has_no_plan(small, folder):
    for config in (small.config, AutoConfig.from_pretrained(folder)):
        with pytest.raises(ValueError, match="plan: DistilBertForSequenceClassification has no masked layers"):
            pk.plan(Auto.from_config(config))


def test_plan_from_a_config_that_was_read(small, folder):
    """`config.quantization_config` is a dict where the config comes from a file."""
    other = copy.deepcopy(small)
    other.config = AutoConfig.from_pretrained(folder)
    assert isinstance(other.config.quantization_config, dict) and pk.plan(other) == pk.plan(small)
