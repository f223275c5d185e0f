"""Where modules were before they moved into rooms: the old paths keep working.

A stand-in lies in `sys.modules` under each old path; it imports nothing before it is asked for a name. It is never an
attribute of the package, so that it hides no function of the same name (`prunekern.plan` is the function).
"""

from __future__ import annotations

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]

# Old path -> new ones, within the package. Of several the first that has a name gives it.
_MOVED: dict[str, tuple[str, ...]] = {
    **{old: (f"pruning.{old}",) for old in ("adapter", "attach", "budget", "criteria", "peft_in", "peft_out")},
    "config": ("pruning.config",),
    "budget_stock": ("pruning.whole_heads",),
    "pruner": ("pruning.pruner", "pruning.rules"),
    "saliency": ("pruning.saliency",),
    "streaming": ("pruning.compact_files", "storage.progress"),
    **{old: (f"compacting.{old}",) for old in ("card", "checkpoint", "compact", "head", "plan")},
    "tensors": ("compacting.tensors", "storage.headers"),
    **{old: (f"exporting.{old}",) for old in ("hub", "plain")},
    "export": ("exporting.onnx",),
    "stock": ("exporting.stock", "pruning.whole_heads", "pruning.pruner"),
    **{old: (f"training.{old}",) for old in ("curves", "progress", "recipe")},
    "trainer": ("training.trainer", "training.checkpoints"),
    **{old: (f"machine.{old}",) for old in ("bf16_trap", "info")},
    "measure": ("machine.measure", "compacting.latency"),
    "folders": ("storage.folders",),
    "shards": ("storage.shards", "storage.json_files"),
    "tokenizer_files": ("storage.tokenizer",),
    **{f"families.{old}": (f"families.encoders.{old}",) for old in ("bert", "distilbert")},
    "families.blocks": ("families.encoders.blocks", "families.key_masks", "families.packs_together"),
    "families.encoder": ("families.encoders.table", "families.encoders.heads"),
    **{f"families.{old}": (f"families.decoders.{old}",) for old in ("cache_room", "llama", "norms")},
    "families.decoder": ("families.decoders.table", "families.decoders.heads"),
    "families.decoder_blocks": ("families.decoders.blocks", "families.decoders.attention"),
    "families.decoder_step": ("families.decoders.step",),
    **{
        f"tasks.{old}": (f"tasks.sources.{old}",)
        for old in (
            "archived", "bigbench", "fetch", "glue", "readers", "reviews", "science", "topics", "tweets", "wikipedia",
            "winogrande",
        )
    },
}  # fmt: skip
# What got another name on the way, as encoders and decoders had the same for different things.
_RENAMED = {
    "stock": {"compare": "compare_stock"},
    "families.encoder": {
        "Block": "EncoderBlock",
        "HeadLayout": "EncoderLayout",
        "head_layout": "encoder_layout",
        "compact_attention_linears": "compact_encoder_attention",
        "compact_ffn_linears": "compact_encoder_ffn",
    },
    "families.decoder": {
        "Block": "DecoderBlock",
        "Heads": "DecoderHeads",
        "HeadLayout": "DecoderLayout",
        "head_layout": "decoder_layout",
        "compact_attention_linears": "compact_decoder_attention",
        "compact_ffn_linears": "compact_decoder_ffn",
    },
}


class _Moved(types.ModuleType):
    """Has the names of the modules that took its place."""

    def __init__(self, old: str):
        name = f"{_PACKAGE}.{old}"
        super().__init__(name, f"Moved to {', '.join(f'{_PACKAGE}.{new}' for new in _MOVED[old])}.")
        self.__spec__ = ModuleSpec(name, None)
        self.__dict__["_old"] = old
        self.__dict__["_replaced"] = {}

    def _modules(self) -> list[types.ModuleType]:
        return [importlib.import_module(f"{_PACKAGE}.{new}") for new in _MOVED[self.__dict__["_old"]]]

    def _holder(self, name: str) -> tuple[types.ModuleType, str] | None:
        """The module that has the name now, and the name it has there."""
        name = _RENAMED.get(self.__dict__["_old"], {}).get(name, name)
        return next(((module, name) for module in self._modules() if hasattr(module, name)), None)

    def __getattr__(self, name: str) -> Any:
        # Whoever walks through sys.modules, asking for files, must not import all of this.
        holder = None if name.startswith("__") else self._holder(name)
        if holder is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} ({self.__doc__})")
        return getattr(*holder)

    def __setattr__(self, name: str, value: object) -> None:
        """Replace it where it is now; `del` puts back what was there first, as patches of tests do."""
        holder = None if name.startswith("__") else self._holder(name)
        if holder is None:
            return super().__setattr__(name, value)
        self.__dict__["_replaced"].setdefault(name, getattr(*holder))
        setattr(*holder, value)

    def __delattr__(self, name: str) -> None:
        if name not in self.__dict__["_replaced"]:
            return super().__delattr__(name)
        module, name_there = self._holder(name) or (self, name)
        setattr(module, name_there, self.__dict__["_replaced"].pop(name))

    def __dir__(self) -> list[str]:
        return sorted({name for module in self._modules() for name in dir(module)})


def keep_old_paths() -> None:
    """Put the stand-ins where `import` finds them."""
    for old in _MOVED:
        sys.modules.setdefault(f"{_PACKAGE}.{old}", _Moved(old))


def stands_for(name: str) -> types.ModuleType | None:
    """What `prunekern.name` was when it was a module; None where there never was one."""
    return sys.modules[f"{_PACKAGE}.{name}"] if name in _MOVED else None
