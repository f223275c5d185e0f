"""Argument checks shared by the ops: each names the argument, what it was and what is accepted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors(op: str, required: Mapping[str, object], optional: Mapping[str, object]) -> None:
    """Raises TypeError, by argument name, for what is no dense tensor; None is none among the optional ones."""
    for names, may_lack in ((required, False), (optional, True)):
        for name, tensor in names.items():
            if tensor is None and may_lack:
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{op}: {name} must be a torch.Tensor (got {type(tensor).__name__})")
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
                kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
                raise TypeError(f"{op}: {name} must be a dense tensor (got a {kind.removeprefix('torch.')} one)")


def activation(op: str, name: object, known: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of `known`."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{op}: activation must be one of {', '.join(known)} (got {name!r})")


def shape(op: str, name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `tensor.shape` equals `expected` (None: any size), TypeError for what is no tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor (got {type(tensor).__name__})")
    got = tuple(tensor.shape)
    if len(got) != len(expected) or any(e is not None and g != e for g, e in zip(got, expected, strict=True)):
        want = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must have shape [{want}] (got {list(got)})")


def floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless `tensor` is float64, float32, bfloat16 or float16."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16 (got {tensor.dtype})")


def dtypes(
    op: str,
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor | None],
    biases: Mapping[str, torch.Tensor | None],
    residual: torch.Tensor | None,
) -> None:
    """Raises TypeError unless all fit x; weights and biases by argument name, None where not given."""
    low = x.dtype in (torch.bfloat16, torch.float16)  # computed in float32 anyway
    for name, weight in weights.items():
        if weight is None or weight.dtype in (x.dtype, torch.bfloat16, torch.int8, torch.uint8):
            continue
        if not (low and weight.dtype == torch.float32):
            accepted = f"{x.dtype} like x, bfloat16, int8 or uint8 (int4)"
            raise TypeError(f"{op}: {name} must be {accepted} (got {weight.dtype})")
    for name, bias in biases.items():
        if bias is not None and bias.dtype != x.dtype and not (low and bias.dtype == torch.float32):
            raise TypeError(f"{op}: {name} must be {x.dtype} like x{', or float32' if low else ''} (got {bias.dtype})")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must be {x.dtype} like x (got {residual.dtype})")


def same_device(op: str, first: str, device: torch.device, **others: torch.Tensor | None) -> None:
    """Raises ValueError when a tensor lies on another device than `first`."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}; all must share a device")


def kept_index(op: str, name: str, index: torch.Tensor, size: int | None) -> None:
    """Raises unless `index` holds kept channels: int64, 1-D, strictly ascending, within [0, size).

    size None: of how many channels is not known yet.
    """
    if index.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64 (got {index.dtype})")
    if index.dim() != 1:
        raise ValueError(f"{op}: {name} must be 1-D (got shape {list(index.shape)})")
    if index.numel() == 0 or index.is_meta:
        return
    bad = index < 0
    if size is not None:
        bad |= index >= size
    if index.numel() > 1:
        bad[1:] |= index[1:] <= index[:-1]
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        limit = "not negative" if size is None else f"< {size}"
        raise ValueError(f"{op}: {name} must be sorted and {limit} (got {int(index[at])} at position {at})")


def kept_index_anywhere(op: str, name: str, index: torch.Tensor, size: int) -> None:
    """`kept_index` that never waits for a device: on a GPU the device itself stops, later."""
    if index.device.type == "cpu":
        kept_index(op, name, index, size)
    elif index.numel() and not _is_checked(index, size):  # no synchronisation
        good = (index[0] >= 0) & (index[-1] < size) & (index[1:] > index[:-1]).all()
        torch._assert_async(good, f"{op}: {name} must be sorted and < {size}")


_CHECKED = WeakTensorKeyDictionary()  # index on a device -> (version, size) it was checked with


def _is_checked(index: torch.Tensor, size: int) -> bool:
    """Whether this very index passed before: the check is six launches, more than the product of a few rows."""
    if torch.compiler.is_compiling() or type(index) is not torch.Tensor or index.is_inference():
        return False
    now = (index._version, size)
    if _CHECKED.get(index) == now:
        return True
    _CHECKED[index] = now
    return False


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object, None]:
    """Context for the products inside an op: autocast would cast their fp32 operands back to 16 bit.

    The norm would lose all but 8 bits, and a bf16 product on CPU kills the process on some machines.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 where an input is float64, fp32 otherwise: what references and small reductions compute in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
