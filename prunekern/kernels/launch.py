"""What every launch asks: block sizes for this GPU, how fp32 products are made, the kernel as PyTorch wants it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

# Less shared memory a block than this, in bytes: consumer GPUs, where sm_86's blocks fit whatever the generation.
LARGE_SHARED = 160 * 1024

Blocks = dict[str, int]  # block sizes, num_warps and num_stages by the names that kernels give them


@functools.cache
def configs() -> dict[str, dict[str, dict[str, list[Blocks]]]]:
    """configs.json: architecture -> kernel -> bits of the products' dtype -> entries.

    An entry holds block sizes, num_warps, num_stages, and may hold `up_to`: the largest size (rank of dora kernels,
    rows of compact ones) it is for. The first that fits is taken.
    """
    read: dict[str, dict[str, dict[str, list[Blocks]]]] = json.loads(
        files(__package__).joinpath("configs.json").read_text()
    )
    return read


def nearest(architecture: str, shared: int | None = None) -> str:
    """The entry of configs.json for a GPU: its own; else the newest of its vendor that is no newer; else the oldest.

    architecture: "sm_90", "gfx942". shared: bytes of shared memory a block may have.
    """
    known = configs()
    if architecture in known:
        return architecture
    vendor = "sm_" if architecture.startswith("sm_") else "gfx"
    if vendor == "sm_" and shared is not None and shared < LARGE_SHARED:
        return "sm_86"
    same = sorted((name for name in known if name.startswith(vendor)), key=_number)
    older = [name for name in same if _number(name) <= _number(architecture)]
    return older[-1] if older else same[0]


def _number(architecture: str) -> int:
    digits = re.sub(r"^\D*", "", architecture)
    return int(digits, 16 if architecture.startswith("gfx") else 10)


@functools.cache
def _of_device(index: int) -> tuple[str, int]:
    """(entry of configs.json, multiprocessors)."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return nearest(properties.gcnArchName.split(":")[0]), properties.multi_processor_count
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return nearest(f"sm_{properties.major}{properties.minor}", shared), properties.multi_processor_count


def device_of(tensor: Tensor) -> tuple[str, int]:
    """(entry of configs.json, multiprocessors). Interpreted kernels run on CPU tensors, as if on an H100."""
    if tensor.device.type != "cuda":
        return "sm_90", 132
    index = tensor.device.index
    return _of_device(torch.cuda.current_device() if index is None else index)


def pick(kernel: str, architecture: str, dtype: torch.dtype, size: int) -> Blocks:
    """Block sizes, num_warps and num_stages for products in `dtype`."""
    for entry in configs()[architecture][kernel][str(8 * dtype.itemsize)]:
        if size <= entry.get("up_to", size):
            return {name: value for name, value in entry.items() if name != "up_to"}
    raise AssertionError(f"configs.json: {kernel} on {architecture} has no entry for {size}")


def by_rank(kernel: str, architecture: str, dtype: torch.dtype, r: int) -> Blocks:
    """`pick` by rank, with BLOCK_R (a power of two of at least 16: what `tl.dot` takes) and ONE_BLOCK."""
    chosen = pick(kernel, architecture, dtype, r)
    chosen.setdefault("BLOCK_R", max(16, 1 << (r - 1).bit_length()))
    return {**chosen, "ONE_BLOCK": r <= chosen["BLOCK_R"]}


def precision(dtype: torch.dtype, architecture: str, exact: bool = False) -> str:
    """How `tl.dot` multiplies: fp32 in three tf32 products, which keep its accuracy, unless PyTorch may use one.

    exact: three whatever PyTorch may do.
    """
    if dtype != torch.float32 or architecture.startswith("gfx"):
        return "ieee"
    if exact:
        return "tf32x3"
    matmul = torch.backends.cuda.matmul  # reading allow_tf32 raises once the newer switch was used
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "tf32x3"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object, None]:
    """Context for a launch: Triton takes the current GPU, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def rows_of(tensor: Tensor) -> Tensor:
    """[n, k] with stride 1 along k, which the kernels take for granted; copied only where it is not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def launchable(kernel: Any) -> Any:
    """The kernel as a graph can hold it. One that is interpreted never is in a graph, and PyTorch 2.11 refuses it."""
    return wrap_triton(kernel) if type(kernel).__name__ != "InterpretedFunction" else kernel
