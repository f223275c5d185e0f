"""A compact model of a class of one's own, on disk: safetensors, and a plan beside them in place of a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..families.own import registered
from ..families.wrapped import is_transformers
from ..nn import CompactLinear, MaskedDoRALinear
from ..storage.json_files import read_json
from ..storage.shards import CODES, SINGLE, Shards
from .plan import Plan, check, remember_plan
from .restoring import check_values
from .skeleton import skeleton
from .stored import ROUNDED, Stored, remember
from .storing import stored_tensors
from .tensors import Headers, check_weight

FILE = "prunekern.json"
FORMAT = 1
_CPU = torch.device("cpu")


def save_own(model: nn.Module, plan: Plan, folder: Path, stored: Stored | None) -> None:
    """Write the tensors of a compact model, and its plan. ValueError for a state dict that holds more than tensors.

    stored: the kinds of weights to write; None: as they are.
    """
    from safetensors.torch import save_file

    if stored is not None:
        stored = replace(stored, embeddings="fp32")  # as they are: nothing tells what reads them
    # All that is asked of such a model are its modules.
    tensors: dict[str, Any] = model.state_dict() if stored is None else stored_tensors(model, stored)
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save: state_dict() must hold tensors only (got a {type(tensor).__name__} at {name!r})")
    twins = _twins(model)
    own = {name: tensor for name, tensor in tensors.items() if twins.get(name, name) == name}
    save_file(_apart(own), folder / SINGLE, metadata={"format": "pt"})
    from .. import __version__

    said = {
        "format": FORMAT,
        "prunekern_version": __version__,
        "class": _name(model),
        "heads": families.attention_heads(model),
        "plan": plan.to_dict(),
    }
    if stored is not None and stored.weights != "fp32":
        said["stored"] = stored.to_dict()
    (folder / FILE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def is_own(path: Path) -> bool:
    """Whether the folder holds a compact model of a class of one's own. A config.json beside it may be one's own, too:
    `save` of a model of transformers removes the plan.
    """
    return (path / FILE).is_file()


def load_own(path: Path, into: nn.Module | None) -> nn.Module:
    """What `save_own` wrote, into a dense model, in place. ValueError naming the argument, or file and tensor."""
    file = path / FILE
    said = read_json(file)
    if type(said.get("format")) is not int or not 1 <= said["format"] <= FORMAT:
        raise ValueError(
            f"{file}: format {said.get('format')!r} was written by prunekern {said.get('prunekern_version')}; this "
            f"version reads up to {FORMAT}. Upgrade prunekern"
        )
    if into is None:
        raise ValueError(f"load: into must be a dense {said.get('class')}, as {path} holds the plan of one (got None)")
    _check_into(into, said)
    table = families.of(into).table(into)
    try:
        plan = Plan.from_dict(said.get("plan", {}))
        stored = None if said.get("stored") is None else Stored.from_dict(said["stored"], plan)
        check(plan, table)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    heads = families.attention_heads(into)
    if said.get("heads") != heads:
        raise ValueError(f"load: into must have {said.get('heads')} attention heads, as {file} says (got {heads})")
    shards = Shards.of_model(path)
    headers = Headers(into, [str(each) for each in sorted(set(shards.files.values()))], str, FILE)
    twins = _twins(into)
    _check_tensors(into, plan, stored, headers, shards, twins)
    codes = {name for name in plan.layers if stored is not None and stored.kind(name) in ROUNDED}
    for name in codes:
        check_values(headers, name, shards.read(f"{name}.weight"), shards.read(f"{name}.scale"))

    own = registered(type(into))
    assert own is not None, "checked above"
    own.remember(into)
    devices = {name: tensor.device for name, tensor in into.state_dict().items()}
    skeleton(into, plan)
    for name in codes:
        layer: Any = into.get_submodule(name)
        layer.set_weights(stored.kind(name))  # type: ignore[union-attr]  # there are codes
        layer.say_as_held(True)
    tensors = {}
    for name in shards.files:
        device = devices[name if name in devices else f"{name.rpartition('.')[0]}.weight"]  # of a scale
        tensors[name] = shards.read(name).to(_CPU if device.type == "meta" else device, copy=True)
    into.load_state_dict(tensors | {twin: tensors[name] for twin, name in twins.items()}, assign=True)
    for twin, name in twins.items():
        owner, _, leaf = twin.rpartition(".")
        first, _, first_leaf = name.rpartition(".")
        setattr(into.get_submodule(owner), leaf, getattr(into.get_submodule(first), first_leaf))
    for name in plan.layers:
        layer = into.get_submodule(name)
        layer.say_as_held(False)
        layer.to(layer.weight.device)  # kept indices
    remember_plan(into, plan)
    if stored is not None:
        remember(into, stored.weights)
    return into


def _check_into(into: nn.Module, said: Mapping[str, Any]) -> None:
    if not isinstance(into, nn.Module) or is_transformers(into) or registered(type(into)) is None:
        got = _name(into) if isinstance(into, nn.Module) else repr(into)
        raise ValueError(f"load: into must be a {said.get('class')}, of a registered class (got {got})")
    if any(isinstance(module, (MaskedDoRALinear, CompactLinear)) for module in into.modules()):
        raise ValueError(f"load: into must be a dense {said.get('class')} (it is attached, or compact, already)")
    kept = into.state_dict()
    for name, buffer in into.named_buffers():
        if buffer.is_meta and name not in kept:
            raise ValueError(f"load: into must hold its buffer {name!r}, which stands in no file (it is on meta)")


def _check_tensors(
    into: nn.Module, plan: Plan, stored: Stored | None, headers: Headers, shards: Shards, twins: Mapping[str, str]
) -> None:
    """ValueError for the first tensor that is missing, not of this model, or of another shape or dtype."""
    known = set()
    for name, layer in plan.layers.items():
        kind = None if stored is None else stored.kind(name)
        check_weight(headers, name, (layer.rows.numel(), layer.cols.numel()), kind)
        if kind is None and shards.dtypes[f"{name}.weight"] not in CODES.values():
            got, accepted = shards.dtypes[f"{name}.weight"], ", ".join(CODES.values())
            raise ValueError(f"{shards.files[f'{name}.weight']}: tensor '{name}.weight' must be {accepted} (got {got})")
        known |= {f"{name}.weight"} | ({f"{name}.scale"} if kind in ROUNDED else set())
        if layer.bias:
            headers.check(f"{name}.bias", (layer.rows.numel(),), "by the plan")
            known.add(f"{name}.bias")
    for name, tensor in into.state_dict().items():
        if name.rpartition(".")[0] in plan.layers or name in twins:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"load: state_dict() of into must hold tensors only (got {type(tensor).__name__} at {name!r})"
            )
        headers.check(name, tuple(tensor.shape), "as into has it")
        known.add(name)
    for name in sorted(set(shards.files) - known):
        raise ValueError(f"{shards.files[name]}: tensor {name!r} is not of this model")


def _twins(model: nn.Module) -> dict[str, str]:
    """Of tensors that have several names in the state dict, as tied ones have: the first name by each other one."""
    first: dict[int, str] = {}
    twins = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            twins[name] = first[id(tensor)]
    return twins


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two in the same memory: safetensors wants them so."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return apart


def _name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
