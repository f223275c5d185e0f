"""The command `prunekern`: train, compact, export, eval, bench, demo, info."""

from __future__ import annotations

import os
import sys

# isort: off  (the order of the help)
from . import evaluate, folders, machine, train  # noqa: F401

# isort: on
from .options import app

__all__ = ["app", "main"]


def _quiet() -> None:
    """One progress bar is ours; those of transformers and datasets, and their load reports, stay off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns at every fork otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


# The extra of pyproject.toml that brings a package.
_EXTRAS = {
    "hf": ("transformers", "datasets", "accelerate", "sklearn", "scipy", "matplotlib"),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript"),
    "eval": ("lm_eval",),
    "peft": ("peft",),
}


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and status 2; the rest keeps its traceback."""
    from ..tasks.sources.fetch import FetchError

    _quiet()
    try:
        app()
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in _EXTRAS.items() if (error.name or "").split(".")[0] in names), None)
        if extra is None:
            raise
        print(f"error: {error.name} is not installed: pip install 'prunekern[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
