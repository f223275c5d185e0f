"""How the wrapper of an op decides that a call is an ordinary one, and hands tensors to the C++ core."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from prunekern import _native

from .watched import WatchedParameter

# The core looks into tensors itself (csrc/python/tensors.h); False without the core or with torch < 2.10.
EAGER: bool = _native.available() and _native.core().use_tensor_types(
    Tensor, torch.nn.Parameter, WatchedParameter
)  # fmt: skip

# What an eager call asks every time, looked up once: an attribute of torch costs as much as the question.
_is_tracing = torch.compiler.is_dynamo_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state
_is_profiled = torch._C._autograd._profiler_enabled
_grad_enabled = torch.is_grad_enabled
threads = torch.get_num_threads


def unwatched() -> bool:
    """Whether no tracer, dispatch mode or functorch transform wants to see the op itself.

    Tracing with fake tensors is noticed by their type, where the core looks into them.
    """
    if _is_tracing() or _dispatch_modes() or _functorch_level() is not None or _jit_trace() is not None:
        return False
    return _forward_ad._current_level < 0


def transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) or forward mode differentiation is at work: then the plain
    PyTorch of the references runs, which all of them know how to take apart.
    """
    if _functorch_level() is None and _forward_ad._current_level < 0:
        return False
    return not torch.compiler.is_compiling()  # tracers use the same machinery


def short() -> bool:
    """Whether a call may go past the dispatcher, straight into the core: nobody looks on, and no profiler either, whose
    rows the dispatcher writes.
    """
    return unwatched() and not _is_profiled()


def plain_eager(x: Tensor) -> bool:
    """The same for a call that stays in Python, where a subclass of Tensor may want to see it too."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and unwatched()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see a call on these."""
    if not _grad_enabled():
        return False
    try:
        for tensor in tensors:  # any() would cost a generator: 0.3 us
            if tensor is not None and tensor.requires_grad:
                return True
    except AttributeError:  # no tensor: not a call to hurry, and the checks of the op say which argument it is
        return True
    return False


def rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """tensor [..., n] as rows: (tensor, address, row stride), copied only where no single stride describes them."""
    tensor = tensor.resolve_neg()
    has_memory("a tensor for the C++ core", tensor)
    if tensor.dim() == 2:
        if tensor.stride(1) != 1 or tensor.stride(0) < 0:
            tensor = tensor.contiguous()
        return tensor, tensor.data_ptr(), tensor.stride(0)
    if not tensor.is_contiguous():
        return rows(tensor.reshape(-1, tensor.shape[-1]))
    return tensor, tensor.data_ptr(), tensor.shape[-1]


@overload
def plain_memory(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@overload
def plain_memory(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...
def plain_memory(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The tensor contiguous, without a sign kept aside, in `dtype`; None stays None."""
    if tensor is None:
        return None
    has_memory("a tensor for the C++ core", tensor)
    return tensor.resolve_neg().contiguous().to(dtype or tensor.dtype)


def has_memory(what: str, tensor: Tensor) -> None:
    """ValueError for a tensor with elements but no storage: fake, of zeros that are not stored, or of a storage that
    was given up (FSDP does that between uses).
    """
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{what} has no memory (got {list(tensor.shape)} {type(tensor).__name__})")


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none. Worth nothing once the tensor is gone: keep it."""
    return 0 if tensor is None else tensor.data_ptr()
