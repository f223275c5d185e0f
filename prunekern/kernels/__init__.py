"""Triton kernels, one file per op, same stem. Importing this package imports neither triton nor a kernel.

Each file holds kernels and, below them, the function that allocates and launches; `prunekern.ops` decides when.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_TRITON = (3, 2)
MOST_RANK = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def problem() -> str | None:
    """Why Triton kernels cannot run here, in one line; None where they can (given a GPU)."""
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error}); pip install triton"
    except Exception as error:  # a broken installation must not take the reference path along
        return f"triton fails to import ({type(error).__name__}: {error})"
    found = tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:2])
    if found < LEAST_TRITON:
        return f"triton is {triton.__version__}, {'.'.join(map(str, LEAST_TRITON))} or newer is needed"
    return None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"prunekern: PyTorch is used in place of Triton kernels: {reason}", stacklevel=4)


def usable(first: Tensor, *others: Tensor | None, rank: int = 1) -> bool:
    """Whether these tensors go to a Triton kernel. Says why not, once, where a user would expect one."""
    if first.device.type != "cuda":
        return False
    tensors = [t for t in (first, *others) if t is not None]
    if any(t.dtype == torch.float64 for t in tensors):
        return False  # references compute in float64; no kernel does
    reason = problem()
    if reason is None and rank > MOST_RANK:
        reason = f"rank {rank} is over {MOST_RANK}"
    if reason is not None:
        _warn(reason)
    return reason is None


def register_early(register: Callable[[], object]) -> None:
    """Register an op of Triton kernels at import where PyTorch is built for GPUs: saved programs then find it."""
    if (torch.version.cuda or torch.version.hip) and problem() is None:
        try:
            register()
        except Exception as error:  # the package must import, and run on CPUs, whatever this Triton cannot do
            reason = f"registering kernels failed ({type(error).__name__}: {error})"
            globals()["problem"] = lambda: reason
