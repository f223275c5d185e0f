"""Compact models and adapters on disk: safetensors and JSON only, replaced as a whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .nn import CompactLinear, MaskedDoRALinear
from .plan import Plan

WEIGHTS = ("fp32",)
ADAPTER_FORMAT = 1

_DTYPES = {"fp32": torch.float32}


# -- compact models ----------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike, max_shard_size: str = "5GB") -> None:
    """Write a compact model to the folder `path` in transformers' layout: safetensors, config.json with the plan.

    The folder is written beside `path` and put in its place in one step: a full disk or a kill leaves the old one
    whole. Other files in the old folder (a tokenizer) are carried over. ValueError for a model that is not compact.
    """
    if not any(isinstance(m, CompactLinear) for m in model.modules()):
        raise ValueError(f"save: model is not compact ({type(model).__name__}); call prunekern.compact(model) first")
    with replacing(Path(path), _is_model_file) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)


def load(path: str | os.PathLike, weights: str = "fp32") -> nn.Module:
    """The compact model in the folder `path`, of the class that config.json names, in eval mode.

    weights: how block weights are held, "fp32". FileNotFoundError where there is no such folder; ValueError for what
    is not a compact model, or is truncated, edited or foreign: the message names file and tensor.
    """
    import transformers

    from . import hf  # noqa: F401  (registers the format)

    if weights not in WEIGHTS:
        raise ValueError(f"load: weights must be one of {WEIGHTS} (got {weights!r})")
    path = Path(path)
    config = read_config(path)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != hf.METHOD:
        raise ValueError(f"{path / 'config.json'}: holds no prunekern plan; this is not a compact model")
    names = config.get("architectures") or []
    one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    cls = getattr(transformers, names[0], None) if one else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{path / 'config.json'}: architectures must name one transformers model class (got {names})")
    model, info = cls.from_pretrained(
        path,
        dtype=_DTYPES[weights],
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `info`
    )
    # transformers fills what is missing with random numbers: right for a new head, not for a model saved whole.
    for name, got, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path}: tensor {name!r} must have shape {list(wanted)} (got {list(got)})")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{path}: tensor {name!r} is missing")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{path}: tensor {name!r} is not of this model")
    return model.requires_grad_(False).eval()


def read_config(path: Path) -> dict:
    """config.json of a model folder. FileNotFoundError or ValueError say what is wrong with it."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder written by prunekern.save")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold a JSON object")
    return config


def read_header(file: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Shapes and byte ranges of a safetensors file's tensors. ValueError for one that is truncated or malformed."""
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file}: is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(f.read(length))
            entries = {}
            for name, entry in header.items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    entries[name] = tuple(int(n) for n in entry["shape"]), int(first), int(last)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: has a malformed safetensors header ({error})") from None
    end = max((e[2] for e in entries.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{file}: is truncated or padded: its header asks for {8 + length + end} bytes, it has {size}")
    return entries


def check_tensors(model: nn.Module, plan: Plan, files: Iterable[str]) -> None:
    """ValueError unless the files hold every block weight and bias of the plan, in its kept shape."""
    files = [str(f) for f in files]
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored.update({name: entry[0] for name, entry in read_header(file).items()})
    where = files[0] if len(files) == 1 else os.path.dirname(files[0])
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, layer in plan.layers.items():
        wanted = {"weight": (layer.rows.numel(), layer.cols.numel())}
        if layer.bias:
            wanted["bias"] = (layer.rows.numel(),)
        for part, shape in wanted.items():
            tensor = f"{name}.{part}"
            # A headless checkpoint under a model with a head, or the other way round: the prefix comes and goes.
            got = next((stored[t] for t in (tensor, tensor.removeprefix(prefix), prefix + tensor) if t in stored), None)
            if got is None:
                raise ValueError(f"{where}: tensor {tensor!r} is missing")
            if got != shape:
                raise ValueError(
                    f"{where}: tensor {tensor!r} must have shape {list(shape)} by the plan (got {list(got)})"
                )


# -- adapters ----------------------------------------------------------------------------------------------------


def _adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything training changes: adapters, magnitudes, logits, thresholds, final flags, the task head."""
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, MaskedDoRALinear):
            own = {"A": module.A, "B": module.B, "magnitude": module.magnitude}
            if module.mask is not None:
                own |= {f"mask.{k}": v for k, v in module.mask.state_dict().items()}
            tensors |= {f"{name}.{k}": v for k, v in own.items()}
    return {n: t.detach() for n, t in tensors.items()}


def save_adapter(pruner, path: str | os.PathLike) -> None:
    """Write what training changed (not the frozen weights) to the folder `path`, replaced in one step."""
    from safetensors.torch import save_file

    with replacing(Path(path), lambda name: name in ("adapter.safetensors", "adapter_config.json")) as folder:
        tensors = {n: t.cpu().contiguous() for n, t in _adapter_tensors(pruner.model).items()}
        save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
        config = {"format": ADAPTER_FORMAT, "prune_config": pruner.config.to_dict(), "pruner": pruner.state_dict()}
        # What `prunekern compact BASE ADAPTER OUT` needs to rebuild the model: its class, and its head's size.
        config["base_model"] = getattr(pruner.model.config, "_name_or_path", "") or None
        config["architecture"] = type(pruner.model).__name__
        config["model_config"] = pruner.model.config.to_diff_dict()
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, path: str | os.PathLike):
    """Attach the adapter in the folder `path` to its dense base model, in place; returns the `Pruner`.

    ValueError when the adapter is of another format, or does not fit the model (the first tensor that is missing,
    unknown or of another shape is named); the model is then left as it was.
    """
    import copy

    from .attach import attach
    from .config import PruneConfig

    config, tensors = _read_adapter(Path(path))
    prune_config = PruneConfig.from_dict(config["prune_config"])
    # Tried on a copy without storage first, so that a refusal leaves the model as it was.
    trial = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})
    attach(trial, prune_config)
    _check_adapter(trial, tensors, Path(path))
    pruner = attach(model, prune_config)
    model.load_state_dict(tensors, strict=False)
    pruner.load_state_dict(config["pruner"])
    return pruner


def load_base(base: str | os.PathLike, adapter: str | os.PathLike) -> nn.Module:
    """The dense model an adapter was trained on, with the task head's shape: class and config as the adapter says."""
    import transformers

    config, _ = _read_adapter(Path(adapter))
    cls = getattr(transformers, str(config.get("architecture")), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{adapter}: architecture must name a transformers model (got {config.get('architecture')!r})")
    return cls.from_pretrained(base, config=cls.config_class.from_dict(config["model_config"]))


def load_adapter_state(pruner, path: str | os.PathLike) -> None:
    """Take an adapter written by `save_adapter` into a model that is attached already. ValueError as `load_adapter`."""
    config, tensors = _read_adapter(Path(path))
    _check_adapter(pruner.model, tensors, Path(path))
    pruner.model.load_state_dict(tensors, strict=False)
    pruner.load_state_dict(config["pruner"])


def _read_adapter(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    file, weights = path / "adapter_config.json", path / "adapter.safetensors"
    for needed in (file, weights):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed}: no such file; expected a folder written by prunekern.save_adapter")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != ADAPTER_FORMAT:
        got = config.get("format") if isinstance(config, dict) else config
        raise ValueError(f"{file}: format must be {ADAPTER_FORMAT} (got {got!r})")
    if not isinstance(config.get("prune_config"), dict) or not isinstance(config.get("pruner"), dict):
        raise ValueError(f"{file}: must hold prune_config and pruner")
    for name in ("steps", "ramp_steps"):
        if type(config["pruner"].get(name)) is not int or config["pruner"][name] < 0:
            raise ValueError(
                f"{file}: pruner {name} must be a non-negative integer (got {config['pruner'].get(name)!r})"
            )
    read_header(weights)
    return config, load_file(weights)


def _check_adapter(attached: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    wanted = {n: tuple(t.shape) for n, t in _adapter_tensors(attached).items()}
    for name in sorted(set(wanted) ^ set(tensors)):
        raise ValueError(f"{file}: tensor {name!r} is {'missing' if name in wanted else 'not of this model'}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"{file}: tensor {name!r} must have shape {list(shape)} for this model (got {got})")


# -- replacing a folder as a whole -------------------------------------------------------------------------------


# What `save_pretrained` writes, and weights in other forms that would contradict it; a model_card.md is not ours.
_MODEL_FILE = re.compile(
    r"config\.json|generation_config\.json|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)


def _is_model_file(name: str) -> bool:
    return _MODEL_FILE.fullmatch(name) is not None


@contextmanager
def replacing(path: Path, ours: Callable[[str], bool]):
    """A temporary folder that takes the place of `path` when the block ends well, and goes when it does not.

    Files of an old folder that are not `ours` are linked over. NotADirectoryError when `path` is a file.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays one: what it points to is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file; expected a folder to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        if path.exists():
            for old in path.iterdir():
                if not ours(old.name) and not (folder / old.name).exists():
                    _carry(old, folder / old.name)
        for file in folder.rglob("*"):
            if file.is_file():
                if ours(file.name):
                    file.chmod(0o666 & ~_umask())  # safetensors writes through a private temporary file
                _sync(file)
        _sync(folder)
        _put(folder, path)
        _sync(path.parent)
    finally:
        # What is left at this name is the unfinished folder, or the old one after the exchange.
        shutil.rmtree(folder, ignore_errors=True)


def _carry(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link)
    else:
        _link(old, new)


def _link(old, new) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(folder: Path, path: Path) -> None:
    """`folder` takes the name `path`, an old folder there takes `folder`'s, in the same instant where Linux can."""
    if not path.exists():
        os.rename(folder, path)
        return
    if _exchange(folder, path):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.rename(path, aside)  # rename onto an empty folder replaces it
    try:
        os.rename(folder, path)
    except OSError:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
