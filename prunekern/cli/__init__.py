"""The command `prunekern`: train, compact, store, export, eval, bench, demo, info."""

from __future__ import annotations

import os
import sys

# isort: off  (the order of the help)
from . import evaluate, folders, machine, train  # noqa: F401

# isort: on
from .errors import guarded
from .options import app

__all__ = ["app", "main"]


def _quiet() -> None:
    """One progress bar is ours; those of transformers and datasets, and their load reports, stay off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns at every fork otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Entry point: an error is one line on stderr and status 2; `prunekern --traceback COMMAND` says where it was."""
    _quiet()
    if sys.argv[1:2] == ["--traceback"]:
        app()
    guarded(lambda: app(standalone_mode=False))
