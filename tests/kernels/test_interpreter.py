"""Every Triton kernel on machines without a GPU: in Triton's interpreter, in a process of its own."""

import pytest
from checks import CHECKS, run


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name):
    # TRITON_INTERPRET is read when a kernel is defined, and then holds for the whole process.
    run(name, TRITON_INTERPRET="1")
