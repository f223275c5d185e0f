"""Damaged, edited and foreign folders are refused by `load`, in one line that names the file."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from tests.helpers.compact_folders import small_model
from tests.helpers.on_disk import edit_json
from tests.helpers.tiny_models import build, names


def edit_config(folder, change):
    edit_json(folder / "config.json", change)


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = names("distilbert", 1)["up"]
Q = names("distilbert", 0)["q"]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_weights(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: is truncated"):
        pk.load(saved)


def test_padded_and_malformed_weights(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 8)
    with pytest.raises(ValueError, match="model.safetensors: is truncated or padded"):
        pk.load(saved)
    length = struct.unpack("<Q", whole[:8])[0]
    file.write_bytes(whole[:8] + b"{" + b"x" * (length - 1) + whole[8 + length :])
    with pytest.raises(ValueError, match="model.safetensors: has a malformed safetensors header"):
        pk.load(saved)
    file.write_bytes(b"PK\3\4" + b"pickle" * 100)
    with pytest.raises(ValueError, match="model.safetensors: is truncated or no safetensors file"):
        pk.load(saved)
    entries = json.dumps({"a": {"dtype": "F32", "shape": "wide", "data_offsets": [0]}}).encode()
    file.write_bytes(struct.pack("<Q", len(entries)) + entries)
    with pytest.raises(ValueError, match="model.safetensors: has a malformed safetensors header"):
        pk.load(saved)


@pytest.mark.parametrize(
    "tensor",
    [f"{UP}.weight", f"{UP}.bias", "classifier.weight", "distilbert.embeddings.word_embeddings.weight"]
    + ["distilbert.transformer.layer.0.sa_layer_norm.bias"],
)
def test_missing_tensor(saved, tensor):
    """Outside the blocks, too: transformers would fill a missing classifier with random numbers."""
    edit_tensors(saved, lambda t: t.pop(tensor))
    with pytest.raises(ValueError, match=f"tensor '{tensor}' is missing"):
        pk.load(saved)


@pytest.mark.parametrize("tensor", [f"{UP}.weight", f"{UP}.bias", "classifier.weight"])
def test_tensor_of_another_shape(saved, tensor):
    edit_tensors(saved, lambda t: t.update({tensor: t[tensor][1:].contiguous()}))
    with pytest.raises(ValueError, match=f"tensor '{tensor}' must have shape"):
        pk.load(saved)


def test_foreign_tensors(saved, tmp_path):
    edit_tensors(saved, lambda t: t.update(stranger=torch.zeros(3)))
    with pytest.raises(ValueError, match="tensor 'stranger' is not of this model"):
        pk.load(saved)
    pk.save(small_model("bert"), tmp_path / "bert")
    (saved / "model.safetensors").write_bytes((tmp_path / "bert" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="model.safetensors: tensor 'distilbert..* is missing"):
        pk.load(saved)
    pk.save(small_model(share=0.3), tmp_path / "other")  # the same architecture, another plan
    (saved / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"must have shape \[.*\] by the plan \(got \["):
        pk.load(saved)


def test_weights_gone(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"model\.safetensors"):
        pk.load(saved)


def section(change):
    return lambda config: change(config["quantization_config"])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.pop("quantization_config"), "config.json: holds no prunekern plan"),
        (
            lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
            "config.json: holds no prunekern plan",
        ),
        (lambda c: c.update(quantization_config=[1]), "config.json: holds no prunekern plan"),
        (
            section(lambda s: s.update(format=4)),
            "format 4 was written by prunekern .*; this version reads up to 3. Upgrade",
        ),
        (section(lambda s: s.update(format="new")), "format 'new' was written by"),
        (section(lambda s: s.update(format=0)), "format 0"),
        (section(lambda s: s.pop("plan")), "config.json: quantization_config has no plan"),
        (section(lambda s: s.update(plan="all")), "plan: must be a mapping"),
        (section(lambda s: s["plan"]["layers"].pop(UP)), f"plan: layer '{UP}' is not in the plan"),
        (section(lambda s: s["plan"]["layers"][UP].update(rows="zz")), f"plan: layer '{UP}': rows must be 'all' or"),
        (
            section(lambda s: s["plan"]["layers"][UP].update(rows="all")),
            "do not match the channel groups|must have shape",
        ),
        (section(lambda s: s["plan"]["layers"][UP].update(shape=[95, 48])), f"layer '{UP}'"),
        (lambda c: c.update(hidden_dim=80), "lin1' must be \\[80, 48\\]"),
        (lambda c: c.update(n_layers=3), "n_layers must be 2, as many as there are tensors for"),
        (lambda c: c.update(architectures=["Nonsense"]), r"must name one transformers model class, or .* \(got \["),
        (lambda c: c.update(architectures=[]), "architectures must name one transformers model class"),
        (lambda c: c.update(architectures=None), "architectures must name one transformers model class"),
        (lambda c: c.update(architectures=["pipeline"]), "architectures must name one transformers model class"),
        (lambda c: c.update(architectures="DistilBertModel"), "architectures must name one transformers model class"),
        (lambda c: c.update(architectures=[["x"]]), "architectures must name one transformers model class"),
    ],
)
def test_edited_config(saved, change, message):
    edit_config(saved, change)
    with pytest.raises(ValueError, match=message):
        pk.load(saved)


def test_config_that_is_no_config(saved, tmp_path):
    file = saved / "config.json"
    whole = file.read_bytes()
    for text, message in (
        (whole[: len(whole) // 2], "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[]", "object"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            pk.load(saved)
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match="config.json: no such file; expected a folder written by prunekern.save"
    ):
        pk.load(saved)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pk.load(tmp_path / "nowhere")


def test_a_dense_checkpoint_is_refused(tmp_path):
    build().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="config.json: holds no prunekern plan; this is not a compact model"):
        pk.load(tmp_path / "dense")
