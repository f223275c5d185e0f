"""prunekern: learn which channels a transformer can do without, remove them, run what is left fast.

Importing this needs torch only; what reads transformers is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import _moved

__version__ = "0.1.0"

_WHERE = {
    "PruneConfig": "pruning.config",
    "attach": "pruning.attach",
    "Pruner": "pruning.pruner",
    "Plan": "compacting.plan",
    "plan": "compacting.plan",
    "compact": "compacting.compact",
    "compact_files": "pruning.compact_files",
    "save": "compacting.checkpoint",
    "load": "compacting.checkpoint",
    "calibrate": "compacting.calibrate",
    "push_to_hub": "exporting.hub",
    "save_stock": "exporting.stock",
    "export_onnx": "exporting.onnx",
    "plain_twin": "exporting.plain",
    "save_adapter": "pruning.adapter",
    "load_adapter": "pruning.adapter",
    "from_peft": "pruning.peft_in",
    "to_peft": "pruning.peft_out",
    "PruneTrainer": "training.trainer",
    "PruneCallback": "training.callback",
    "optimizer": "training.optimizer",
    "Distillation": "training.distillation",
    "DistilLoss": "training.embeddings",
    "info": "machine.info",
}
_ROOMS = (
    "nn", "ops", "tasks", "families", "hf", "demo",
    "pruning", "compacting", "exporting", "training", "machine", "storage",
)  # fmt: skip

__all__ = [*_WHERE, "nn", "ops", "__version__"]

_moved.keep_old_paths()


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    old = _moved.stands_for(name)
    if old is not None:
        return old
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
