"""One device for every tensor: the CPU for Triton's interpreter, a GPU otherwise."""

import numpy as np
import pytest
import torch

from tests.helpers.kernel_definitions import DEVICE

torch.set_default_device(DEVICE)

if DEVICE == "cpu":
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter keeps bf16 as 16-bit integers, and its dot multiplies those (triton 3.9): widen them first.
    def _widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _dot(self, a, b, d, *args):
        return _create_dot(self, _widened(a), _widened(b), d, *args)

    interpreter.InterpreterBuilder.create_dot = _dot


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
