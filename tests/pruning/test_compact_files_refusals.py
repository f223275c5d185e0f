"""What `compact_files` refuses, in one line and with OUT as it was; a disk that is full; where OUT may be."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.pruning import compact_files as module
from prunekern.pruning.compact_files import compact_files
from prunekern.storage.shards import has_safetensors
from tests.helpers.on_disk import content, edit_json, litter
from tests.helpers.streamed import Q, build, names_of, on_disk, rename, run, tensors
from tests.helpers.tiny_models import attached


@pytest.fixture
def folder(tmp_path):
    """BASE in shards, ADAPTER, and an OUT that must stay as it is."""
    on_disk(tmp_path, build("distilbert", "sequence"), "30KB")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    return tmp_path


def refused(folder, message, error=ValueError, **options):
    before = content(folder / "out")
    with pytest.raises(error, match=message) as caught:
        run(folder, **options)
    assert "\n" not in str(caught.value)
    assert content(folder / "out") == before and not litter(folder)


def shard_of(folder, tensor):
    return json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def change_tensor(folder, tensor, change):
    file = folder / "base" / shard_of(folder, tensor)
    own = load_file(file)
    new = change(own.pop(tensor))
    save_file(own if new is None else own | {tensor: new}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_shard(folder, keep):
    file = folder / "base" / shard_of(folder, f"{Q}.weight")
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, f"{file.name}: is truncated")


def test_weights_of_another_base(folder):
    change_tensor(folder, f"{Q}.weight", lambda weight: 1.01 * weight)
    refused(folder, rf"adapter: was trained on another base model: the squares of '{Q}.weight' sum up to")


def test_damaged_shards(folder):
    file = folder / "base" / shard_of(folder, f"{Q}.weight")
    whole = file.read_bytes()
    file.write_bytes(b"PK\3\4" + b"pickle" * 100)
    refused(folder, f"{file.name}: is truncated or no safetensors file")
    file.write_bytes(whole.replace(b'"F32"', b'"F77"', 1))
    refused(folder, f"{file.name}: has a malformed safetensors header .*dtype 'F77' is unknown")
    file.unlink()
    refused(folder, f"{file.name}: no such file, model.safetensors.index.json names it", FileNotFoundError)


def test_missing_tensors(folder):
    index = folder / "base" / "model.safetensors.index.json"
    text = index.read_text()
    edit_json(index, lambda i: i["weight_map"].pop(f"{Q}.weight"))
    refused(folder, f"index.json: has no tensor '{Q}.weight'; the adapter in .* was trained on another base model")
    index.write_text(text)
    change_tensor(folder, f"{Q}.weight", lambda t: None)
    refused(folder, f"model-.*: tensor '{Q}.weight' is missing, model.safetensors.index.json says it is here")


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "index.json: is not valid JSON"),
        ("[]", r"index.json: must hold a JSON object \(got list\)"),
        ("{}", "index.json: weight_map must name a file"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "weight_map must name a file of this folder"),
        ('{"weight_map": {"a": 3}}', "weight_map must name a file"),
        ('{"weight_map": {}}', "has no tensor"),
    ],
)
def test_damaged_index(folder, text, message):
    (folder / "base" / "model.safetensors.index.json").write_text(text)
    refused(folder, message)


@pytest.mark.parametrize("tensor", [f"{Q}.weight", f"{Q}.bias", "distilbert.embeddings.word_embeddings.weight"])
def test_wrong_shape_and_dtype(folder, tensor):
    change_tensor(folder, tensor, lambda t: torch.cat([t, t]))
    refused(folder, rf"model-.*: tensor '{tensor}' must have shape \[.*\] for the adapter in .* \(got \[")
    change_tensor(folder, tensor, lambda t: t[: len(t) // 2].to(torch.int8))
    refused(folder, rf"model-.*: tensor '{tensor}' must be of F64, F32, BF16, F16 \(got torch.int8\)")


def test_a_head_of_another_size_in_the_base_is_no_matter(folder):
    change_tensor(folder, "classifier.weight", lambda t: t[:2].contiguous())
    run(folder)
    assert tensors(folder / "out")["classifier.weight"].shape[0] == 3


def test_old_names_are_refused_by_name(tmp_path):
    on_disk(tmp_path, build("bert", "sequence"))
    rename(tmp_path, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma"))
    (tmp_path / "out").mkdir()
    refused(tmp_path, "tensor 'bert.embeddings.LayerNorm.gamma' has a name of old")


def test_bin_weights_and_none(folder):
    assert has_safetensors(folder / "base") and not has_safetensors(folder / "nowhere")
    for file in (folder / "base").glob("model*"):
        file.unlink()
    refused(folder, "base: holds neither model.safetensors nor model.safetensors.index.json", FileNotFoundError)
    (folder / "base" / "pytorch_model.bin").write_bytes(b"x")
    assert not has_safetensors(folder / "base")
    refused(folder, "pytorch_model.bin: is no safetensors file; load the model and save it once")


def test_config_of_the_base(folder):
    file = folder / "base" / "config.json"
    for text, message in (
        ("{", "config.json: is not valid JSON"),
        ('{"quantization_config": {"quant_method": "prunekern"}}', "config.json: holds a quantization_config"),
        ('{"model_type": "bert"}', r"config.json: model_type must be 'distilbert', .* \(got 'bert'\)"),
    ):
        file.write_text(text)
        refused(folder, message)
    file.unlink()
    refused(folder, "config.json: no such file", FileNotFoundError)


def test_adapter_of_another_base(folder, tmp_path):
    deep = build("distilbert", "sequence", layers=3)
    deep.save_pretrained(folder / "base", max_shard_size="30KB")
    refused(folder, r"tensor 'distilbert.transformer.layer.2.*' is not of this model; .* another base model")
    build("distilbert", "sequence", layers=1).save_pretrained(folder / "base", max_shard_size="30KB")
    refused(folder, r"has no tensor 'distilbert.transformer.layer.1.*; .* another base model")
    build("distilbert", "sequence", hidden_dim=80).save_pretrained(folder / "base", max_shard_size="30KB")
    refused(folder, r"must have shape \[96, 48\] for the adapter|must have shape \[96\] for the adapter")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(format=3), r"adapter_config.json: format must be 2 \(got 3\)"),
        (lambda c: c.update(architecture="os.system"), "architecture must name a transformers model"),
        (lambda c: c.pop("model_config"), r"must hold a model_config \(got None\)"),
        (lambda c: c["prune_config"].update(rank=2), r"must have shape \[2, 48\] for this model \(got \[4, 48\]\)"),
        (lambda c: c["model_config"].update(n_layers=3), r"n_layers must be 2, as many as there are tensors for"),
    ],
)
def test_edited_adapter(folder, change, message):
    edit_json(folder / "adapter" / "adapter_config.json", change)
    refused(folder, message)


def test_damaged_adapter(folder):
    file = folder / "adapter" / "adapter.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if n != f"{Q}.A"}, file)
    refused(folder, f"tensor '{Q}.A' is missing")
    file.write_bytes(b"short")
    refused(folder, "adapter.safetensors: is truncated")
    file.unlink()
    refused(folder, "adapter.safetensors: no such file", FileNotFoundError)


def test_shrunk_plan_that_its_masks_contradict(tmp_path):
    model = build("distilbert", "sequence")
    model.save_pretrained(tmp_path / "base")
    pruner = attached(model, sparsity=0.3)
    pruner.finalize()
    pruner.shrink()
    pk.save_adapter(pruner, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    file = tmp_path / "adapter" / "adapter.safetensors"
    own = load_file(file)
    name = next(n for n in own if n.endswith("lin1.mask.logits"))
    save_file(own | {name: own[name] - 1e3}, file)
    refused(tmp_path, "its masks do not keep what the shrunk plan")


def test_tied_twins_that_differ(tmp_path):
    on_disk(tmp_path, build("llama", "causal", tie_word_embeddings=True))
    (tmp_path / "out").mkdir()
    file = tmp_path / "base" / "model.safetensors"
    own = load_file(file)
    save_file(own | {"lm_head.weight": own["model.embed_tokens.weight"] + 1}, file)
    refused(tmp_path, "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'|'model.embed_.*' differs from")


def test_shard_size_that_is_none(folder):
    refused(folder, "many", max_shard_size="many")


@pytest.mark.parametrize("when", ["writing", "sync", "config"])
def test_full_disk_leaves_out_as_it_was(folder, when, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "sync":
        monkeypatch.setattr(os, "fsync", full)
    elif when == "config":
        monkeypatch.setattr(module, "_write_configs", full)
    else:
        real, calls = module.write_shard, []

        def write(*args):
            real(*args)
            calls.append(args)
            if len(calls) == 2:
                full()

        monkeypatch.setattr(module, "write_shard", write)
    refused(folder, "No space left", OSError, max_shard_size="30KB")
    monkeypatch.undo()
    run(folder)
    assert pk.load(folder / "out") is not None


def test_out_that_is_a_file_and_out_with_other_files(folder):
    (folder / "out" / "tokenizer.json").write_text("{}")
    run(folder)
    assert names_of(folder / "out") == {"config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(NotADirectoryError, match="file: is a file"):
        (folder / "file").write_text("mine")
        compact_files(folder / "base", folder / "adapter", folder / "file")


def test_out_may_be_the_base(folder):
    before = tensors(folder / "base")
    plan = compact_files(folder / "base", folder / "adapter", folder / "base")
    assert tensors(folder / "base").keys() == before.keys() and pk.plan(pk.load(folder / "base")) == plan
