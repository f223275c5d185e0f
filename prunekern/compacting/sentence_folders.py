"""Compact models of sentence-transformers on disk: its own folder, and in it that of the compact transformer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..families.sentence import leave_unread_out, transformer_in
from ..nn import CompactLinear
from ..storage.folders import replacing
from ..storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"


def is_sentence_folder(path: Path) -> bool:
    """Whether `path` is a folder that sentence-transformers wrote."""
    return (path / MODULES).is_file() and (path / CONFIG).is_file()


def save_sentence(
    model: Any,
    path: str | os.PathLike[str],
    save_inner: Callable[[PreTrainedModel, Path], None],
    is_model_file: Callable[[str], bool],
) -> None:
    """All that sentence-transformers writes, and in the transformer's place what `save_inner(model, folder)` does.

    Replaced in one step, as by `prunekern.save`. ValueError for a model that is not compact.
    """
    inner = transformer_in(model, "save")
    if not any(isinstance(module, CompactLinear) for module in inner.modules()):
        raise ValueError(f"save: model is not compact ({type(model).__name__}); call prunekern.compact(model) first")

    def is_replaced(name: str) -> bool:  # modules' folders begin with their number
        return is_model_file(name) or ((Path(path) / name).is_dir() and name.partition("_")[0].isdigit())

    with replacing(Path(path), is_replaced) as folder:
        model.save_pretrained(str(folder))
        save_inner(inner, _transformer_folder(folder, model, inner))


def _transformer_folder(folder: Path, model: nn.Module, inner: nn.Module) -> Path:
    """Where in `folder` the transformers model lies."""
    at = next(i for i, part in enumerate(model.children()) if getattr(part, "auto_model", None) is inner)
    return folder / str(json.loads((folder / MODULES).read_text(encoding="utf-8"))[at]["path"])


def load_sentence(path: Path, set_inner: Callable[[PreTrainedModel], Any]) -> Any:
    """The SentenceTransformer, CrossEncoder, ... in the folder `path`, on the CPU, in eval mode, frozen.

    `set_inner(model)` packs the compact transformer. ValueError for a folder whose transformer is not compact;
    ImportError without sentence-transformers.
    """
    from .hf import METHOD

    modules = json.loads((path / MODULES).read_text(encoding="utf-8"))
    parts = [path / str(entry.get("path", "")) for entry in modules]
    configs = [part for part in parts if (part / "config.json").is_file() and _method(part) is not None]
    if not any(_method(part) == METHOD for part in configs):
        read_json(
            parts[0] / "config.json", "a folder written by prunekern.save"
        )  # says what is wrong with the file, where that is the reason
        raise ValueError(f"{path}: no module of {MODULES} holds a prunekern plan; this is not a compact model")
    try:
        import sentence_transformers
    except ImportError:
        raise ImportError(
            f"{path}: is a model of sentence-transformers, which is not installed; pip install 'prunekern[st]'"
        ) from None
    name = read_json(path / CONFIG).get("model_type", "SentenceTransformer")
    kind = getattr(sentence_transformers, str(name), None)
    if kind is None:
        raise ValueError(f"{path / CONFIG}: model_type must be a class of sentence-transformers (got {name!r})")
    # With a map sentence-transformers does not look at the device of every tensor at every call, which
    # takes as long as a small model's blocks do for a sentence; model.to() moves it all the same.
    model = kind(str(path), local_files_only=True, model_kwargs={"device_map": "cpu"})
    inner = transformer_in(model, "load")
    set_inner(inner)
    leave_unread_out(model, inner)
    return model.requires_grad_(False).eval()


def _method(part: Path) -> Any:
    try:
        section = json.loads((part / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (ValueError, AttributeError):
        return None
    return section.get("quant_method") if isinstance(section, dict) else None
