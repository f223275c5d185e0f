"""Adapters on disk: training goes on exactly, what does not fit is refused and the model left as it was."""

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.pruning.adapter import load_base
from tests.helpers.on_disk import content, edit_json, litter
from tests.helpers.tiny_models import attached, batch, build, logits, names, state, unchanged

Q = names("distilbert", 0)["q"]


def trained(final=False, **options):
    model = build(seed=0)
    pruner = attached(model, **{"sparsity": 0.4, "dropout": 0.1} | options)
    with torch.no_grad():
        model.classifier.weight.add_(0.3)
    for _ in range(3):
        pruner.step()
    if final:
        pruner.finalize()
    return model, pruner


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper", "sparsity": 0.2}, {"targets": ["k_lin", "lin1"], "sparsity": 0.1}]
)
def test_adapter_round_trip(final, options, tmp_path):
    model, pruner = trained(final, **options)
    pk.save_adapter(pruner, tmp_path / "a")
    assert set(content(tmp_path / "a")) == {"adapter.safetensors", "adapter_config.json"}
    other = build(seed=0)
    back = pk.load_adapter(other, tmp_path / "a")
    assert back.config == pruner.config and back.steps == pruner.steps and back.finalized == pruner.finalized
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for training in (False, True):
        torch.manual_seed(5)
        want = logits(model.train(training), batch())
        torch.manual_seed(5)
        assert torch.equal(logits(other.train(training), batch()), want)  # noise and dropout included
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in other.named_parameters()} == flags
    assert back.plan() == pruner.plan()


def test_adapter_file_holds_what_training_changed_only(tmp_path):
    model, pruner = trained()
    pk.save_adapter(pruner, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter.safetensors")
    assert not [n for n in stored if n.endswith("_lin.weight") or "embedding" in n or "layer_norm" in n]
    assert {"classifier.weight", "pre_classifier.bias"} <= set(stored)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(stored)


def test_adapter_of_a_resumed_pruner_goes_on_alike(tmp_path):
    model, pruner = trained()
    pk.save_adapter(pruner, tmp_path / "a")
    back = pk.load_adapter(build(seed=0), tmp_path / "a")
    for p in (pruner, back):
        p.step()
    a, b = (torch.cat([m.noise for m in p.masks.values()]) for p in (pruner, back))
    assert torch.equal(a, b)


def refused(folder, message, error=ValueError, model=None):
    """load_adapter raises, and the model is as it was."""
    model = build(seed=0) if model is None else model
    before, modules = state(model), dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        pk.load_adapter(model, folder)
    unchanged(model, before)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.fixture
def adapter(tmp_path):
    pk.save_adapter(trained()[1], tmp_path / "a")
    return tmp_path / "a"


def test_adapter_that_does_not_fit(adapter):
    refused(adapter, "tensor '.*' is (missing|not of this model)", model=build("bert"))
    refused(adapter, r"tensor 'distilbert.transformer.layer.0.ffn.lin1.*' must have shape", model=build(hidden_dim=80))
    refused(adapter, r"layer\.2\..*' is missing", model=build(layers=3))
    refused(adapter, r"tensor 'classifier\..*' must have shape", model=build(num_labels=5))
    refused(adapter, "model is attached already", model=trained()[0])


def edit_adapter(folder, change):
    edit_json(folder / "adapter_config.json", change)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: c.update(format=3), r"adapter_config.json: format must be 2 \(got 3\)"),
        (lambda c: c.pop("format"), r"format must be 2 \(got None\)"),
        (lambda c: c.pop("pruner"), "must hold prune_config and pruner"),
        (lambda c: c.update(prune_config=3), "must hold prune_config and pruner"),
        (lambda c: c["prune_config"].update(rank=0), "PruneConfig: rank must be an integer of at least 1"),
        (lambda c: c["prune_config"].update(strange=0), "PruneConfig: unknown field 'strange'"),
        (lambda c: c["prune_config"].update(rank=2), r"must have shape \[2, 48\] for this model \(got \[4, 48\]\)"),
        (lambda c: c["pruner"].pop("steps"), "adapter_config.json: .*steps"),
        (lambda c: c["pruner"].update(steps="many"), "adapter_config.json: .*steps"),
    ],
)
def test_edited_adapter_config(adapter, change, message):
    edit_adapter(adapter, change)
    refused(adapter, message)


def test_damaged_adapter_files(adapter):
    weights, config = adapter / "adapter.safetensors", adapter / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_bytes()
    weights.write_bytes(whole[:-10])
    refused(adapter, "adapter.safetensors: is truncated")
    tensors = {n: t for n, t in load_file_of(whole, adapter).items() if n != f"{Q}.A"}
    save_file(tensors, weights)
    refused(adapter, f"tensor '{Q}.A' is missing")
    save_file({**load_file_of(whole, adapter), "stranger": torch.zeros(1)}, weights)
    refused(adapter, "tensor 'stranger' is not of this model")
    weights.write_bytes(whole)
    config.write_bytes(text[:50])
    refused(adapter, "adapter_config.json: is not valid JSON")
    config.write_text("[]")
    refused(adapter, r"adapter_config.json: must hold a JSON object \(got list\)")
    config.unlink()
    refused(adapter, "adapter_config.json: no such file", FileNotFoundError)
    config.write_bytes(text)
    weights.unlink()
    refused(adapter, "adapter.safetensors: no such file", FileNotFoundError)


def load_file_of(data, folder):
    file = folder / "whole.safetensors"
    file.write_bytes(data)
    return load_file(file)


def test_adapter_save_failing_keeps_the_old_one(adapter, monkeypatch):
    before = content(adapter)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        pk.save_adapter(trained(final=True)[1], adapter)
    monkeypatch.undo()
    assert content(adapter) == before and not litter(adapter.parent)


def test_adapter_leaves_other_files_of_the_folder(adapter):
    (adapter / "adapter_notes.md").write_text("mine")
    (adapter / "optimizer.pt").write_bytes(b"x")
    pk.save_adapter(trained()[1], adapter)
    assert set(content(adapter)) == {"adapter.safetensors", "adapter_config.json", "adapter_notes.md", "optimizer.pt"}


def test_load_base_rebuilds_the_dense_model_of_an_adapter(tmp_path):
    """The head's size comes from the adapter, not from the base checkpoint."""
    build("distilbert", "base").save_pretrained(tmp_path / "base")
    model, pruner = trained()
    with torch.no_grad():  # the base the adapter was trained on
        model.distilbert.embeddings.load_state_dict(build("distilbert", "base").embeddings.state_dict())
    pk.save_adapter(pruner, tmp_path / "a")
    dense = load_base(tmp_path / "base", tmp_path / "a")
    assert type(dense) is type(model) and dense.config.num_labels == 3
    back = pk.load_adapter(dense, tmp_path / "a")
    assert back.plan() == pruner.plan()
    edit_adapter(tmp_path / "a", lambda c: c.update(architecture="os.system"))
    with pytest.raises(ValueError, match=r"architecture must name a transformers model \(got 'os.system'\)"):
        load_base(tmp_path / "base", tmp_path / "a")


def test_load_base_refuses_another_base_model(tmp_path):
    _, pruner = trained()
    pk.save_adapter(pruner, tmp_path / "a")
    build("bert", "base").save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match=r"has no tensor 'distilbert\..*; the adapter in .* was trained on another base"
    ):
        load_base(tmp_path / "bert", tmp_path / "a")
    wide = build("distilbert", "base")
    wide.resize_token_embeddings(77)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"tensor 'distilbert.embeddings.*' must have shape \[50, .*\(got \[77, "):
        load_base(tmp_path / "wide", tmp_path / "a")


def test_final_before_the_warm_steps_are_over(tmp_path):
    """Loaded into a pruner that would be warm by its count: the masks are final all the same."""
    model = build()
    pruner = attached(model, sparsity=0.4, warm_steps=20)
    model.train()
    optimizer = torch.optim.SGD(pruner.param_groups(0.1))
    for seed in range(3):
        model(**batch(seed=seed), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    pruner.finalize()
    pk.save_adapter(pruner, tmp_path)
    again = build().train()
    loaded = pk.load_adapter(again, tmp_path)
    assert loaded.finalized and not loaded.warm
    assert loaded.expected_sparsity() == pruner.expected_sparsity() > 0.3
    assert torch.equal(logits(again, batch()), logits(model, batch()))


@pytest.mark.parametrize("shrunk", (False, True))
def test_a_base_with_other_weights_is_refused(shrunk, tmp_path):
    pruner = attached(build(), sparsity=0.4)
    pruner.finalize()
    if shrunk:
        pruner.shrink()
    pk.save_adapter(pruner, tmp_path)
    pk.load_adapter(build().bfloat16(), tmp_path)  # the same weights, rounded
    other = build()
    name = names("distilbert", 1)["up"]
    with torch.no_grad():
        other.get_submodule(name).weight.mul_(1.01)
    before = state(other)
    with pytest.raises(ValueError, match=f"another base model: the squares of '{name}.weight' sum up to"):
        pk.load_adapter(other, tmp_path)
    unchanged(other, before)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.pop("base_norms"))  # as older ones are
    pk.load_adapter(build(), tmp_path)
