"""What training changed, on disk: adapters, magnitudes, masks, the task head and whatever else was made trainable,
without the frozen weights, which are told again by their fingerprints.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .. import families
from ..compacting.checkpoint import naming
from ..compacting.plan import Plan, dense_sizes
from ..families.own import registered, registered_as
from ..families.sizes import check_sizes
from ..families.wrapped import is_transformers, unwrapped
from ..nn import MaskedDoRALinear
from ..nn.merging import pick
from ..ops import row_sqnorm
from ..storage.folders import replacing
from ..storage.headers import read_header
from ..storage.json_files import read_json
from ..storage.shards import Shards, has_safetensors
from .attach import attach, task_head
from .config import PruneConfig
from .embeddings import embedding_names, resized_for
from .flags import other_flags, set_flags
from .frozen import check_frozen, fingerprints, is_fingerprints
from .pruner import Pruner

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_FORMAT = 2


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything training changes: adapters, magnitudes, logits, thresholds, final flags, the task head, be it frozen
    or not, and every other parameter that requires a gradient.
    """
    head = {id(p) for p in task_head(model)}
    # What the class ties has one name; what only this model shares (transformers' resizing does) has all of them.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if n not in tied]
    tensors = {n: p for n, p in named if p.requires_grad or id(p) in head}
    for name, module in model.named_modules():
        if isinstance(module, MaskedDoRALinear):
            own = {"A": module.A, "B": module.B, "magnitude": module.magnitude}
            if module.mask is not None:
                own |= {f"mask.{k}": v for k, v in module.mask.state_dict().items()}
            tensors |= {f"{name}.{k}": v for k, v in own.items()}
    return {n: t.detach() for n, t in tensors.items()}


def save_adapter(
    pruner: Pruner, path: str | os.PathLike[str], save_embeddings: bool | Literal["auto"] = "auto"
) -> None:  # fmt: skip
    """Write what training changed (not the frozen weights) to the folder `path`, replaced in one step.

    Besides adapters, magnitudes, masks and the task head: every parameter that was made trainable; and, as PEFT does,
    input and output embeddings where the model has tokens that its base (`model.config.name_or_path`, a folder or in
    the hub's cache) has not. save_embeddings: True writes them always, False only where they are trainable. Of what is
    frozen, fingerprints are written: `load_adapter` and `compact_files` refuse a base that differs, by the name of the
    tensor. ValueError for a model that was wrapped after `attach` in what splits or renames its weights.
    """
    from safetensors.torch import save_file

    if not (isinstance(save_embeddings, bool) or save_embeddings == "auto"):
        raise ValueError(f"save_adapter: save_embeddings must be True, False or 'auto' (got {save_embeddings!r})")
    model = unwrapped(pruner.model, "save_adapter")
    with replacing(Path(path), lambda name: name in ("adapter.safetensors", "adapter_config.json")) as folder:
        parameters = dict(model.named_parameters())
        embeddings = {n: parameters[n].detach() for n in embedding_names(model, save_embeddings)}
        tensors = _on_their_own(adapter_tensors(model) | embeddings)
        save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
        config = {"format": ADAPTER_FORMAT, "prune_config": pruner.config.to_dict(), "pruner": pruner.state_dict()}
        # What `prunekern compact BASE ADAPTER OUT` needs to rebuild the model: its class, and its head's size.
        config["base_norms"] = pruner.base_norms()
        config["fingerprints"] = fingerprints(model, tensors)
        config |= other_flags(model)
        config["architecture"] = type(model).__name__
        if is_transformers(model):
            config["base_model"] = getattr(model.config, "_name_or_path", "") or None
            fields = model.config.to_diff_dict()
            fields.pop("quantization_config", None)  # of a run of `PruneCallback`: the adapter says it all itself
            config["model_config"] = fields
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: PreTrainedModel, path: str | os.PathLike[str]) -> Pruner:
    """Attach the adapter in the folder `path` to its dense base model, in place; returns the `Pruner`.

    What was trainable there is trainable here. Embeddings that the adapter brings take the place of the model's, which
    gets as many tokens as they have.

    ValueError when the adapter is of another format, or does not fit the model (the first tensor that is missing,
    unknown or of another shape is named, or the first frozen tensor that is another base model's); the model is then
    left as it was.
    """

    config, tensors = read_adapter(Path(path))
    model = unwrapped(model, "load_adapter", in_place=True)
    prune_config = PruneConfig.from_dict(config["prune_config"])
    # Tried on a copy without storage first, so that a refusal leaves the model as it was.
    trial = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})
    resized_for(trial, tensors)
    attach(trial, prune_config).load_state_dict(config["pruner"])
    check_adapter(trial, tensors, Path(path))
    with families.splitting(model):
        for name, module in model.named_modules():
            if name in config["base_norms"] and f"{name}.weight" not in tensors and not module.weight.is_meta:
                check_base(config, name, row_sqnorm(module.weight).double().sum().item(), path)
        _check_frozen(model, config, tensors, path)
    resized_for(model, tensors)
    pruner = attach(model, prune_config)
    pruner.load_state_dict(config["pruner"])
    model.load_state_dict(tensors, strict=False)
    set_flags(model, config)
    pruner.settle()
    return pruner


def _on_their_own(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, no two in the same memory: safetensors wants them so."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return own


def _check_frozen(
    model: nn.Module, config: dict[str, Any], saved: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> None:
    """A dense, masked or shrunk `model` against the fingerprints in `config`; a shrunk run's are of what was kept."""
    shrunk = config["pruner"].get("shrunk")
    layers = Plan.from_dict(shrunk).layers if shrunk else {}
    tensors: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)

    def here(name: str) -> torch.Tensor | None:
        tensor, kept = tensors.get(name), layers.get(name.rpartition(".")[0])
        if tensor is None or kept is None or tensor.is_meta:
            return tensor
        if tuple(tensor.shape) not in ((kept.out_features,), (kept.out_features, kept.in_features)):
            return tensor  # shrunk already
        return pick(tensor.detach(), kept.rows.to(tensor.device), kept.cols.to(tensor.device))

    check_frozen({n: f for n, f in config["fingerprints"].items() if n not in saved}, here, path)


def load_base(base: str | os.PathLike[str], adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """The dense model an adapter was trained on, with the task head's shape: class and config as the adapter says.

    ValueError when `base` is another model: a tensor that neither it nor the adapter holds, or of another shape.
    """
    config, tensors = read_adapter(Path(adapter))
    cls = model_class(config, Path(adapter))
    shapes = Shards.of_model(Path(base)).shapes if has_safetensors(Path(base)) else {}
    own = model_config(config, Path(adapter), shapes, {n: tuple(t.shape) for n, t in tensors.items()})
    with naming(Path(adapter) / "adapter_config.json"):
        model, info = cls.from_pretrained(
            base,
            config=own,
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


def model_config(
    config: dict[str, Any], adapter: Path, base: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> PretrainedConfig:
    """The config of the dense model, held against the shapes of the base's tensors and of the adapter's own.

    ValueError for a size that is none, or not that of the tensors. base: may be empty, where it is not known yet.
    """
    file, fields = adapter / "adapter_config.json", config["model_config"]
    shrunk = config["pruner"].get("shrunk")
    if base and registered(model_class(config, adapter)) is None:
        # Blocks are those of the adapter, and so is a vocabulary that it brings. Else `base` may be another model,
        # which is said later by the name of a tensor: here its widths are no more than a bound.
        tables = {n: s for n, s in base.items() if n.endswith(("position_embeddings.weight", "type_embeddings.weight"))}
        widths = [n for shape in base.values() for n in shape] + dense_sizes(shrunk)
        check_sizes(fields, f"{file}: model_config", {**tables, **own}, widths)
    with naming(file):
        made: PretrainedConfig = model_class(config, adapter).config_class.from_dict(fields)
    return made


def model_class(config: dict[str, Any], adapter: Path) -> type[PreTrainedModel]:
    """The class that an adapter names. ValueError where it names none of transformers, or holds no model_config."""
    import transformers

    name = str(config.get("architecture"))
    cls = getattr(transformers, name, registered_as(name))
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
        if f"{name}.weight" not in tensors:
            check_base(config, name, norm, path)
    was_shrunk = pruner.shrunk
    if not was_shrunk:
        _check_frozen(pruner.model, config, tensors, path)
    pruner.load_state_dict(config["pruner"])
    check_adapter(pruner.model, tensors, Path(path))
    if was_shrunk:  # to the same channels, as is known now
        _check_frozen(pruner.model, config, tensors, path)
    pruner.model.load_state_dict(tensors, strict=False)
    set_flags(pruner.model, config)
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
    if not is_fingerprints(config.setdefault("fingerprints", {})):
        raise ValueError(f"{file}: fingerprints must hold shape, dtype, squares and crc by tensor name")
    for name in ("frozen", "thawed"):
        if not isinstance(config.setdefault(name, []), list):
            raise ValueError(f"{file}: {name} must be a list of parameter names (got {config[name]!r})")
    for name in ("steps", "warm_steps", "ramp_steps"):
        if type(config["pruner"].get(name)) is not int or config["pruner"][name] < 0:
            raise ValueError(
                f"{file}: pruner {name} must be a non-negative integer (got {config['pruner'].get(name)!r})"
            )
    read_header(weights)
    return config, load_file(weights)


def check_adapter(attached: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """ValueError unless `tensors` has what training changes, and nothing but parameters of the model besides."""
    wanted = {n: tuple(t.shape) for n, t in adapter_tensors(attached).items()}
    known = wanted | {n: tuple(p.shape) for n, p in attached.named_parameters(remove_duplicate=False)}
    for name in sorted((set(wanted) - set(tensors)) | (set(tensors) - set(known))):
        raise ValueError(f"{file}: tensor {name!r} is {'missing' if name in wanted else 'not of this model'}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != known[name]:
            got = list(tensor.shape)
            raise ValueError(f"{file}: tensor {name!r} must have shape {list(known[name])} for this model (got {got})")
