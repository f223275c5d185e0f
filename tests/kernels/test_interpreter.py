"""Every Triton kernel on machines without a GPU: in Triton's interpreter, in a process of its own."""

import pytest

from tests.helpers.kernel_checks import CHECKS, run

LONG = ("check_compact.py", "check_dora.py")  # a minute each


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CHECKS])
def test_interpreted(name):
    # TRITON_INTERPRET is read when a kernel is defined, and then holds for the whole process.
    # The other: where a hypervisor hides the AMX tile palettes, 16-bit products of PyTorch would kill the process.
    run(name, TRITON_INTERPRET="1", ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16")
