"""Whether PyTorch multiplies bf16 matrices on this CPU: safely, and faster than fp32 ones.

On some CPUs its bf16 product kills the process, on others (AVX512_BF16 of Sapphire Rapids without AMX) it runs at half
the speed of fp32. Where it is both safe and faster, training under bf16 autocast multiplies in bf16; else it widens.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

FASTER = 1.2  # times fp32: less is within the noise of a shared machine, and the choice should not change by the day
_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


@functools.cache
def bf16_matmul_crashes() -> bool:
    """Whether PyTorch's bf16 product kills a process on this CPU: tried in a child, which may die.

    Only a CPU that announces AMX is asked, which takes some seconds; elsewhere oneDNN does not go that way.
    """
    flags = _cpu_flags()
    if flags and "amx_tile" not in flags:  # asked too where there is no telling
        return False
    code = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


@functools.cache
def multiplies_bf16() -> bool:
    """Whether bf16 products on the CPU are safe, and by FASTER faster than fp32 ones: measured once, in 0.2 s.

    False where the CPU has no instruction for them, without a measurement.
    """
    if not _cpu_flags() & _INSTRUCTIONS or bf16_matmul_crashes():
        return False
    # A tracer that asks first must not see the measurement, nor lend it tensors without memory.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wide = torch.ones(256, 768, dtype=torch.float32, device="cpu")
        weight = torch.ones(768, 768, dtype=torch.float32, device="cpu")
        narrow = wide.bfloat16(), weight.bfloat16()
        return _seconds(wide, weight) > FASTER * _seconds(*narrow)


def multiplies_in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether x and a plain weight on the CPU are multiplied in bf16: autocast says so, and `multiplies_bf16` does."""
    if not x.is_cpu or not torch.is_autocast_enabled("cpu") or torch.float64 in (x.dtype, weight.dtype):
        return False
    return torch.get_autocast_dtype("cpu") is torch.bfloat16 and multiplies_bf16()


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Of one product, the least of several."""
    least = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        x @ weight.T
        least = min(least, time.perf_counter() - start)
    return least


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """What Linux says this CPU can do; empty where there is no telling."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
