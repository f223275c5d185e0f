"""Sizes in a config that are none, or not those of the tensors, are refused before anything is made of them."""

import json
import resource
from contextlib import contextmanager

import pytest

import prunekern as pk
from prunekern.families.sizes import check_sizes
from prunekern.pruning.adapter import load_base
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.on_disk import edit_json
from tests.helpers.streamed import build, on_disk
from tests.helpers.tiny_models import CLASSES, attached, prune

FIELDS = {
    "distilbert": ["dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "max_position_embeddings", "num_labels"],
    "bert": ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    + ["max_position_embeddings", "type_vocab_size"],
    "llama": ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    + ["head_dim", "vocab_size"],
}
CASES = [(family, field) for family, fields in FIELDS.items() for field in fields]
HUGE = (10**9, 10**6, 10**30)
NONE = (0, -1, 2.5, float("nan"), float("inf"), "many", True, [1], {})


@contextmanager
def little_memory():
    """2 GB above what is in use: what allocates a billion of anything fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A compact model, and a base with an adapter, of every family."""
    made = {}
    for family in FIELDS:
        task = "causal" if family == "llama" else "sequence"
        folder = tmp_path_factory.mktemp(family)
        model = (tiny_decoders if family == "llama" else tiny_models).build(family, task)
        prune(attached(model), 0.5)
        pk.save(pk.compact(model), folder / "m")
        on_disk(folder, build(family, task))
        made[family] = folder
    return made


@contextmanager
def edited(file, change):
    whole = file.read_text()
    edit_json(file, change)
    try:
        yield
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("family,field", CASES)
def test_load(family, field, folders):
    path = folders[family] / "m"
    for value in (*HUGE, *NONE):
        with (
            edited(path / "config.json", lambda config, value=value: config.update({field: value})),
            little_memory(),
            pytest.raises(ValueError, match=rf"m/config.json: {field} must be .* \(got ") as caught,
        ):
            pk.load(path)
        assert repr(value) in str(caught.value) or json.dumps(value) in str(caught.value)


@pytest.mark.parametrize("family,field", [case for case in CASES if case[1] != "num_labels"])
def test_from_pretrained(family, field, folders):
    """transformers reads the config itself, and may refuse it first; `num_labels` it takes for a list of names."""
    path = folders[family] / "m"
    cls = tiny_decoders.CLASSES["llama", "causal"][1] if family == "llama" else CLASSES[family, "sequence"]
    theirs = "divide|multiple|Validation|by zero"
    for value in (*HUGE, 0, -1):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with (
                edited(path / "config.json", lambda config, value=value: config.update({field: value})),
                little_memory(),
                pytest.raises(Exception, match=rf"{field} must be|must (be|have shape) \[|{theirs}"),
            ):
                cls.from_pretrained(path, **options)


@pytest.mark.parametrize("family,field", [case for case in CASES if case[1] != "num_labels"])
def test_base_and_adapter(family, field, folders):
    """`compact_files`, and `load_base` on the way through memory."""
    folder = folders[family]
    for value in (*HUGE[:2], 0, 2.5, "many"):
        with edited(
            folder / "adapter" / "adapter_config.json", lambda c, value=value: c["model_config"].update({field: value})
        ):
            for call in (
                lambda: pk.compact_files(folder / "base", folder / "adapter", folder / "out"),
                lambda: load_base(folder / "base", folder / "adapter"),
            ):
                with (
                    little_memory(),
                    pytest.raises(ValueError, match=rf"adapter_config.json: model_config: {field} must be .* \(got "),
                ):
                    call()
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"vocab_size": 51}, r"vocab_size must be 50, as tensor '.*word_embeddings.weight' of shape \[50, 48\] says"),
        (
            {"max_position_embeddings": 41},
            r"max_.* must be 40, as tensor '.*position_embeddings.weight' of shape \[40, 48\]",
        ),
        ({"n_layers": 3}, r"n_layers must be 2, as many as there are tensors for \(got 3\)"),
        ({"n_heads": 3}, r"the attention heads must be the 4 of the plan's dense model \(got 3\)"),
        ({"n_heads": 97}, r"n_heads must be at most 96, the largest size of a tensor \(got 97\)"),
        ({"pad_token_id": 10**9}, r"transformers makes no model of it \(AssertionError: Padding_idx must be within"),
        ({"dropout": "much"}, r"transformers makes no model of it \(StrictDataclassFieldValidationError: .*'dropout'"),
    ],
)
def test_messages(change, message, folders):
    path = folders["distilbert"] / "m"
    with (
        edited(path / "config.json", lambda config: config.update(change)),
        pytest.raises(ValueError, match=f"config.json: {message}"),
    ):
        pk.load(path)


def test_rotary_positions_have_no_tensor():
    """A context longer than any tensor is wide is what language models have."""
    shapes = {"model.embed_tokens.weight": (61, 72), "model.layers.0.mlp.up_proj.weight": (96, 72)}
    fields = {"hidden_size": 72, "num_hidden_layers": 1, "vocab_size": 61, "num_key_value_heads": None}
    check_sizes(fields | {"max_position_embeddings": 131072}, "config.json", shapes)
    check_sizes({}, "config.json", {})
    with pytest.raises(ValueError, match="config.json: num_hidden_layers must be 1, as many"):
        check_sizes(fields | {"num_hidden_layers": 2}, "config.json", shapes)


def test_folders_of_before_know_no_heads(folders):
    path = folders["bert"] / "m"
    with edited(path / "config.json", lambda config: config["quantization_config"].pop("heads")):
        assert pk.load(path).config.quantization_config.heads == 4
