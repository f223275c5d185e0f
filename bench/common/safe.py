"""Peers whose bf16 and int8 products kill the process: on CPUs whose hypervisor hides AMX's tiles, oneDNN's do."""

from __future__ import annotations

import os
import sys

from bench.common import progress
from prunekern.ops.narrow import bf16_matmul_crashes

VARIABLE, WITHOUT_AMX = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"


def without_amx_if_it_kills() -> str | None:
    """What oneDNN is held to. Where its products would kill this process, Python starts anew with AMX forbidden, for
    everyone in it: peers that take turns must share a process. oneDNN reads the variable once, at its first product.
    """
    held = os.environ.get(VARIABLE)
    if held is None and bf16_matmul_crashes():
        progress.say(f"oneDNN's products on AMX kill the process on this CPU: starting anew with {VARIABLE}")
        os.environ[VARIABLE] = WITHOUT_AMX
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return held
