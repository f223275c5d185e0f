"""What `prunekern info` prints: versions, instruction set, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from prunekern import __version__, _native, kernels

from .bf16_trap import BF16_REASON, bf16_matmul_crashes
from .measure import peak_gflops, read_bandwidth


def info(measure: bool = False) -> dict[str, Any]:
    """The facts that decide which kernels run here, and how fast they can be.

    Returns a dict with `version`, `python`, `torch`, `triton` (None where absent), `platform`, `kernels` (whether
    the C++ kernels are there), `remedy` (one line on what is missing and how to get it, or None), `isa` (in use, or
    None), `cpu_isas` (what this CPU can run, worst first), `amx` ("works", or why it is not used), `arithmetic` (what
    the instruction set in use multiplies with instructions of its own: fp32, bf16, int8), `bf16` (what decided whether
    vectors of bf16 are multiplied, or widened to fp32), `threads` (what an op will use), `cores`, `openmp` (runtimes
    loaded in this process), `cuda`, `warnings` (a list of lines).
    measure: also, in a second or two, `fp32_peak` (of one core, GFLOP/s), `bf16_peak` and `int8_peak` (10^9 operations
    a second; None where there is no such arithmetic, and of AMX), `read_bandwidth` (of one core, GB/s), and whether
    PyTorch's own bf16 products would kill the process here (some seconds more on CPUs with AMX): then
    `warnings` names the variable that avoids it.
    """
    available = _native.available()
    runtimes = openmp_runtimes()
    warnings: list[str] = []
    core = _native.core() if available else None
    facts: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernels": available,
        "remedy": _native.why_not(),
        "isa": None if core is None else core.isa(),
        "cpu_isas": list(_native._C.supported_isas()) if _native._C is not None else [],
        "amx": _native._C.amx_verdict()[1] if _native._C is not None else None,
        "arithmetic": [] if core is None else _arithmetic(core),
        "bf16": None if core is None else core.bf16_verdict()[1],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp": runtimes,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "warnings": warnings,
    }
    if len(runtimes) > 1:
        warnings.append(
            f"{len(runtimes)} OpenMP runtimes are loaded ({', '.join(runtimes)}): their threads may wait for one "
            "another. Import torch before prunekern._C"
        )
    if facts["cuda"] is not None and kernels.problem() is not None:
        warnings.append(f"Triton kernels are not used: {kernels.problem()}")
    if measure:
        if available:
            for arithmetic in ("fp32", "bf16", "int8"):
                facts[f"{arithmetic}_peak"] = round(peak_gflops(arithmetic=arithmetic), 1) or None
            facts["read_bandwidth"] = round(read_bandwidth(), 1)
        if bf16_matmul_crashes():
            warnings.append(BF16_REASON)
    return facts


def _arithmetic(core: Any) -> list[str]:
    # AMX multiplies bf16 in tiles, whose peak is not run: setting them up is more than its loop.
    has = {
        "fp32": True,
        "bf16": core.run_peak(1, "bf16") > 0 or core.isa() == "amx",
        "int8": core.run_peak(1, "int8") > 0,
    }
    return [name for name, there in has.items() if there]


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP libraries in this process; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    loaded = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(Path(path).name for path in loaded if re.match(r"lib(gomp|omp|iomp5)\b", Path(path).name))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
