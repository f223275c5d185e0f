"""Files in few bits that are damaged or edited are refused by file and tensor."""

import math

import pytest
import torch

import prunekern as pk
from tests.helpers.compact_folders import small_model
from tests.helpers.few_bits import decoder, edit
from tests.helpers.on_disk import edit_json
from tests.helpers.tiny_models import names

UP, Q = names("distilbert", 1)["up"], names("distilbert", 0)["q"]


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


def test_a_config_that_is_nested_too_deep(tmp_path):
    pk.save(small_model(), tmp_path / "m", weights="int8")
    (tmp_path / "m" / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"config.json: is not valid JSON \(nested too deep\)"):
        pk.load(tmp_path / "m")
