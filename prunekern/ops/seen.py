"""Whether tensors still are what something was computed from: packed weights, cached norms.

A write is seen by one of these:

- another tensor, or another address, in its place;
- PyTorch's version counter: every in-place operation, and steps of optimisers (see `versions`);
- a read of `parameter.data` or `parameter.numpy()`, which may have written: see `watched`;
- on the CPU a fingerprint of some of its values (csrc/include/prunekern/fingerprint.h): 9 of them, or one of every
  row and column where the version counter says nothing (tensors made under inference_mode) or somebody else holds the
  memory, too; every one where `look` says so.

What is missed: a few values, but not a whole row or column, written through memory that was handed out by other means
(`parameter.detach().numpy()`, DLPack, an address) after the look at it; less than the whole weight, where the alias
was made after it. On other devices than the CPU there is no fingerprint.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekern import _native

from . import calls
from .watched import WatchedParameter, watch

FEW, LINES, ALL = 0, 1, 2  # csrc/include/prunekern/fingerprint.h
FEW_OF_BUFFER = -1  # few, though nobody counts reads of `.data`: what is written to a part through it may be missed
_FINGERPRINT: Callable[..., int] | None = _native.core().fingerprint if _native.available() else None
_PARTS = 8  # of an entry
_PLAIN = (Tensor, torch.nn.Parameter, WatchedParameter)
_DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool, torch.int64
)  # fmt: skip
_numbers = itertools.count(1)
_by_number: weakref.WeakValueDictionary[int, Seen] = weakref.WeakValueDictionary()

Entry = tuple[Tensor, type, int, int, list[int] | None, int, int, int]


class Seen:
    """How a tensor was when it was looked at. `holds(tensor)`: whether it still is that.

    `entry` is what csrc/python/unchanged.cpp compares. `number` names this object in compiled graphs, which hold no
    other thing: see `still_holds`.
    """

    __slots__ = ("entry", "number", "__weakref__")

    def __init__(self, tensor: Tensor, look: int = FEW):
        self.number = next(_numbers)
        self.entry = _entry(tensor, look)
        _by_number[self.number] = self

    def look(self, tensor: Tensor, look: int = FEW) -> None:
        """Look at this tensor as it is now, under the same number."""
        self.entry = _entry(tensor, look)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the memory that was seen, unchanged. It may be another name for it."""
        if not self.entry[2] and tensor is not self.entry[0]:  # without memory of its own there is only its identity
            return False
        return _is_as_seen(tensor, *self.entry[2:])


def still_holds(number: int, tensor: Tensor) -> bool:
    """`Seen.holds` of the one with this number; no where it is gone."""
    seen = _by_number.get(number)
    return seen is not None and seen.holds(tensor)


def _is_unchanged(same: tuple[Any, ...], hooks: tuple[Any, ...], seen: tuple[Any, ...]) -> bool:
    for owner, key, value in zip(same[::3], same[1::3], same[2::3], strict=True):
        if owner.get(key) is not value:
            return False
    if any(hooks):
        return False
    return all(
        type(tensor) is kind and _is_as_seen(tensor, *rest)
        for tensor, kind, *rest in zip(*(seen[i::_PARTS] for i in range(_PARTS)), strict=True)
    )


# (same, hooks, seen) -> whether of `same`, triples (dict, key, value), each dict has that very value (None: or
# nothing), each dict of `hooks` is empty, and each tensor of `seen`, entries one after the other, is as it was.
is_unchanged: Callable[[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]], bool] = (
    _native.core().unchanged if calls.EAGER else _is_unchanged
)


def _is_as_seen(
    tensor: Tensor, address: int, version: int, reads: list[int] | None, count: int, look: int, values: int
) -> bool:
    if _address(tensor) != address or version_of(tensor) != version:
        return False
    return (reads is None or reads[0] == count) and fingerprint(tensor, look) == values


def version_of(tensor: Tensor) -> int:
    """Counts in-place changes of `tensor`; -1 for tensors made under inference_mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _entry(tensor: Tensor, look: int) -> Entry:
    # The fingerprint last: what another thread writes meanwhile makes it another version.
    reads = watch(tensor)
    count, version = 0 if reads is None else reads[0], version_of(tensor)
    if look in (FEW, FEW_OF_BUFFER):
        unknown = version < 0 or (reads is None and look == FEW)
        is_known_by_few = not (tensor.is_cpu and type(tensor) in _PLAIN) or not (unknown or _is_shared(tensor))
        look = FEW if is_known_by_few else LINES
    return tensor, type(tensor), _address(tensor), version, reads, count, look, fingerprint(tensor, look)


def _address(tensor: Tensor) -> int:
    """Where a tensor lies; 0 for subclasses, which may lie in several places or in none."""
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


def _is_shared(tensor: Tensor) -> bool:
    """Whether another tensor lies in the same memory: a count that the tensor itself and the asking make two."""
    storage = tensor.untyped_storage()
    uses: int = torch._C._storage_Use_Count(storage._cdata)
    return uses > 2


def fingerprint(tensor: Tensor, look: int = ALL) -> int:
    """A number of the values of `tensor` (any shape and strides) that changes with them; 0 where there is no core to
    compute it, or no memory on the CPU to look at.
    """
    if _FINGERPRINT is None or not tensor.is_cpu or tensor.dtype not in _DTYPES or not tensor.numel():
        return 0
    address, size = _address(tensor), tensor.itemsize
    if not address:
        return 0
    if tensor.dim() == 2:
        return _FINGERPRINT(address, *tensor.shape, *tensor.stride(), size, look)
    if tensor.dim() <= 1:
        return _FINGERPRINT(address, 1, tensor.numel(), 0, *(tensor.stride() or (1,)), size, look)
    if tensor.is_contiguous():
        return _FINGERPRINT(
            address, tensor.numel() // tensor.shape[-1], tensor.shape[-1], *tensor.stride()[-2:], size, look
        )
    of_parts = tuple(fingerprint(part, look) for part in tensor.unbind(0))
    return of_parts[0] if len(of_parts) == 1 else hash(of_parts)
