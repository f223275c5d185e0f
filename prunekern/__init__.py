"""prunekern: learn which channels a transformer can do without, remove them, run what is left fast.

Importing this needs torch only; what reads transformers is imported when first used.
"""

from __future__ import annotations

import importlib
import sys
import types

__version__ = "0.1.0"

_WHERE = {
    "PruneConfig": "config",
    "attach": "attach",
    "Pruner": "pruner",
    "Plan": "plan",
    "plan": "plan",
    "compact": "compact",
    "compact_files": "streaming",
    "save": "checkpoint",
    "load": "checkpoint",
    "push_to_hub": "hub",
    "save_stock": "stock",
    "export_onnx": "export",
    "plain_twin": "plain",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "from_peft": "peft_in",
    "to_peft": "peft_out",
    "PruneTrainer": "trainer",
    "info": "info",
}
_ROOMS = ("nn", "ops", "tasks", "families", "hf", "stock", "demo")

__all__ = [*_WHERE, "nn", "ops", "__version__"]


def __getattr__(name: str):
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])


class _Package(types.ModuleType):
    """Importing the file `plan.py` would bind the module over the function `plan`: bind the function instead."""

    def __setattr__(self, name, value):
        if _WHERE.get(name) == name and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
