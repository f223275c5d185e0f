"""What training changed, on disk: adapters, magnitudes, masks and the task head, without the frozen weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn import MaskedDoRALinear
from ..ops import row_sqnorm
from ..storage.folders import replacing
from ..storage.headers import read_header
from ..storage.json_files import read_json
from .attach import attach
from .config import PruneConfig
from .pruner import Pruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FORMAT = 2


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything training changes: adapters, magnitudes, logits, thresholds, final flags, the task head."""
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, MaskedDoRALinear):
            own = {"A": module.A, "B": module.B, "magnitude": module.magnitude}
            if module.mask is not None:
                own |= {f"mask.{k}": v for k, v in module.mask.state_dict().items()}
            tensors |= {f"{name}.{k}": v for k, v in own.items()}
    return {n: t.detach() for n, t in tensors.items()}


def save_adapter(pruner: Pruner, path: str | os.PathLike[str]) -> None:
    """Write what training changed (not the frozen weights) to the folder `path`, replaced in one step."""
    from safetensors.torch import save_file

    with replacing(Path(path), lambda name: name in ("adapter.safetensors", "adapter_config.json")) as folder:
        tensors = {n: t.cpu().contiguous() for n, t in adapter_tensors(pruner.model).items()}
        save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
        config = {"format": ADAPTER_FORMAT, "prune_config": pruner.config.to_dict(), "pruner": pruner.state_dict()}
        # What `prunekern compact BASE ADAPTER OUT` needs to rebuild the model: its class, and its head's size.
        config["base_norms"] = pruner.base_norms()
        config["base_model"] = getattr(pruner.model.config, "_name_or_path", "") or None
        config["architecture"] = type(pruner.model).__name__
        config["model_config"] = pruner.model.config.to_diff_dict()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: PreTrainedModel, path: str | os.PathLike[str]) -> Pruner:
    """Attach the adapter in the folder `path` to its dense base model, in place; returns the `Pruner`.

    ValueError when the adapter is of another format, or does not fit the model (the first tensor that is missing,
    unknown or of another shape is named, or the first layer whose weight is another base model's); the model is then
    left as it was.
    """

    config, tensors = read_adapter(Path(path))
    prune_config = PruneConfig.from_dict(config["prune_config"])
    # Tried on a copy without storage first, so that a refusal leaves the model as it was.
    trial = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})
    attach(trial, prune_config).load_state_dict(config["pruner"])
    check_adapter(trial, tensors, Path(path))
    for name, module in model.named_modules():
        if name in config["base_norms"] and not module.weight.is_meta:
            check_base(config, name, row_sqnorm(module.weight).double().sum().item(), path)
    pruner = attach(model, prune_config)
    pruner.load_state_dict(config["pruner"])
    model.load_state_dict(tensors, strict=False)
    pruner.settle()
    return pruner


def load_base(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """The dense model an adapter was trained on, with the task head's shape: class and config as the adapter says.

    ValueError when `base` is another model: a tensor that neither it nor the adapter holds, or of another shape.
    """
    config, tensors = read_adapter(Path(adapter))
    cls = model_class(config, Path(adapter))
    model, info = cls.from_pretrained(
        base,
        config=cls.config_class.from_dict(config["model_config"]),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
    )
    # transformers fills what is missing with random numbers; only what the adapter brings itself may be missing.
    for name in sorted(set(info["missing_keys"]) - set(tensors)):
        raise ValueError(f"{base}: has no tensor {name!r}; the adapter in {adapter} was trained on another base model")
    for name, got, wanted in sorted(m for m in info["mismatched_keys"] if m[0] not in tensors):
        raise ValueError(
            f"{base}: tensor {name!r} must have shape {list(wanted)} for the adapter in {adapter} (got {list(got)})"
        )
    return model


def model_class(config: dict[str, Any], adapter: Path) -> type[PreTrainedModel]:
    """The class that an adapter names. ValueError where it names none of transformers, or holds no model_config."""
    import transformers

    cls = getattr(transformers, str(config.get("architecture")), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{adapter}: architecture must name a transformers model (got {config.get('architecture')!r})")
    if not isinstance(config.get("model_config"), dict):
        raise ValueError(f"{adapter}: must hold a model_config (got {config.get('model_config')!r})")
    return cls


def load_adapter_state(pruner: Pruner, path: str | os.PathLike[str]) -> None:
    """Take an adapter written by `save_adapter` into a model that is attached already.

    ValueError as `load_adapter`, and for an adapter of another config than the pruner's.
    """
    config, tensors = read_adapter(Path(path))
    theirs, ours = PruneConfig.from_dict(config["prune_config"]).to_dict(), pruner.config.to_dict()
    for name in ours:
        if theirs[name] != ours[name]:
            raise ValueError(
                f"{path}: was trained with {name}={theirs[name]!r}, this run has {name}={ours[name]!r}; resume with "
                "the config it was trained with, or train into another folder"
            )
    if not config["pruner"].get("shrunk"):
        check_adapter(pruner.model, tensors, Path(path))
    for name, norm in pruner.base_norms().items():
        check_base(config, name, norm, path)
    pruner.load_state_dict(config["pruner"])
    check_adapter(pruner.model, tensors, Path(path))
    pruner.model.load_state_dict(tensors, strict=False)
    pruner.settle()


def check_base(config: dict[str, Any], name: str, norm: float, adapter: str | os.PathLike[str]) -> None:
    """ValueError unless `norm` is near the sum of squares that layer `name` had where the adapter was trained.

    What another dtype or quantisation rounds does not count. Adapters of before this was written down pass.
    """
    wanted = config["base_norms"].get(name, norm)
    if not abs(norm - wanted) <= 1e-3 * wanted:
        raise ValueError(
            f"{adapter}: was trained on another base model: the squares of {name + '.weight'!r} sum up to {wanted:.6g} "
            f"there, to {norm:.6g} here"
        )


def read_adapter(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    file, weights = path / "adapter_config.json", path / "adapter.safetensors"
    for needed in (file, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: no such file; expected a folder written by prunekern.save_adapter")
    config = read_json(file)
    if config.get("format") != ADAPTER_FORMAT:
        raise ValueError(f"{file}: format must be {ADAPTER_FORMAT} (got {config.get('format')!r})")
    if not isinstance(config.get("prune_config"), dict) or not isinstance(config.get("pruner"), dict):
        raise ValueError(f"{file}: must hold prune_config and pruner")
    norms = config.setdefault("base_norms", {})
    if not isinstance(norms, dict) or not all(type(norm) in (int, float) for norm in norms.values()):
        raise ValueError(f"{file}: base_norms must be numbers by layer name (got {norms!r})")
    for name in ("steps", "warm_steps", "ramp_steps"):
        if type(config["pruner"].get(name)) is not int or config["pruner"][name] < 0:
            raise ValueError(
                f"{file}: pruner {name} must be a non-negative integer (got {config['pruner'].get(name)!r})"
            )
    read_header(weights)
    return config, load_file(weights)


def check_adapter(attached: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    wanted = {n: tuple(t.shape) for n, t in adapter_tensors(attached).items()}
    for name in sorted(set(wanted) ^ set(tensors)):
        raise ValueError(f"{file}: tensor {name!r} is {'missing' if name in wanted else 'not of this model'}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"{file}: tensor {name!r} must have shape {list(shape)} for this model (got {got})")
