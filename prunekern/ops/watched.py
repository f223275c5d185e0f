"""Parameters that count how often somebody was handed their memory.

`p.data` is a tensor of its own whose writes no version counter of `p` shows. So who holds something computed from `p`
asks whether it was handed out since.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_DATA: Any = torch._C.TensorBase.data  # a getset descriptor
_READS = WeakTensorKeyDictionary()  # parameter -> [how often]; no attribute of it: it would be pickled
# Compilers and copies look at `.data`, and write nothing.
_READERS = (
    "torch._dynamo", "torch._functorch", "torch._inductor", "torch._export", "torch.export", "torch.fx",
    "torch.nn.parameter", "torch._tensor",
)  # fmt: skip


class WatchedParameter(nn.Parameter):
    """What `watch` makes of an `nn.Parameter`, in place. It behaves, is copied and is pickled as one."""

    @property
    def data(self) -> Tensor:
        """As of Tensor; counted."""
        _count(self)
        alias: Tensor = _DATA.__get__(self)
        return alias

    @data.setter
    def data(self, value: Tensor) -> None:
        _count(self)
        _DATA.__set__(self, value)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """As of Tensor; counted."""
        _count(self)
        return super().numpy(*args, **kwargs)


def _count(parameter: WatchedParameter) -> None:
    reads = _READS.get(parameter)
    if reads is not None and not sys._getframe(2).f_globals.get("__name__", "").startswith(_READERS):
        reads[0] += 1


def watch(tensor: Tensor) -> list[int] | None:
    """From now on reads of `tensor.data` are counted in the list that is returned, by whoever asked for it first.

    None for what cannot be watched: other tensors than `nn.Parameter`.
    """
    if type(tensor) is nn.Parameter:
        tensor.__class__ = WatchedParameter
    if type(tensor) is not WatchedParameter:
        return None
    reads: list[int] | None = _READS.get(tensor)
    if reads is None:
        reads = _READS[tensor] = [0]
    return reads
