"""What `prunekern info` prints: versions, instruction set, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from prunekern import __version__, _native


def info() -> dict[str, Any]:
    """The facts that decide which kernels run here.

    Returns a dict with `version`, `python`, `torch`, `triton` (None where absent), `platform`, `kernels` (whether
    the C++ kernels are there), `remedy` (one line on what is missing and how to get it, or None), `isa` (in use, or
    None), `cpu_isas` (what this CPU can run, worst first), `threads` (what an op will use), `cores`, `cuda`.
    """
    available = _native.available()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernels": available,
        "remedy": _native.why_not(),
        "isa": _native.core().isa() if available else None,
        "cpu_isas": list(_native._C.supported_isas()) if _native._C is not None else [],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
