"""PyTorch's bf16 products kill the process on some CPUs: whether they would here."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

REMEDY = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
BF16_REASON = (
    "PyTorch's bf16 matrix product dies with an illegal instruction on this CPU (oneDNN sees AMX announced without its "
    f"tile palettes). Train in fp32, or start Python with {REMEDY}"
)


@functools.cache
def bf16_matmul_crashes() -> bool:
    """Whether PyTorch's bf16 product kills a process on this CPU: tried in a child, which may die.

    Only a CPU that announces AMX is asked, which takes some seconds; elsewhere oneDNN does not go that way.
    """
    if not _announces_amx():
        return False
    code = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); torch.nn.functional.linear(a, a)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


def _announces_amx() -> bool:
    """True too where there is no telling."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
