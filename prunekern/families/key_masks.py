"""What transformers' attention masks allow, where they forbid whole keys only: what our kernels take."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.seen import fingerprint, version_of

_bool = torch.bool


def key_mask_of(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether a mask of transformers forbids whole keys only and, if so, those allowed, bool [batch, keys] or None.

    transformers hands over None, or a bool [batch, 1, queries, keys] that repeats the padding of each sequence for
    every query. Only its values can tell it from another mask: they are compared once a forward pass (all blocks get
    the same tensor), which a graph of torch.compile cannot do.
    """
    if mask is None:
        return True, None
    if mask.dim() != 4 or mask.dtype is not _bool or mask.shape[1] != 1:
        return False, None
    if mask.shape[2] != 1 and mask.stride(2) != 0 and not _answer(_repeats_rows, mask):
        return False, None
    return True, mask[:, 0, 0]


def causal_key_mask_of(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether a mask of transformers forbids whole keys and what follows a query only, and the keys allowed.

    As `key_mask_of`; the queries are the last tokens: the last of them sees every key that is allowed at all.
    """
    if mask is None:
        return True, None
    if mask.dim() != 4 or mask.dtype is not _bool or mask.shape[1] != 1 or mask.shape[2] > mask.shape[3]:
        return False, None
    if mask.shape[2] != 1 and not _answer(_is_causal, mask):
        return False, None
    return True, mask[:, 0, -1]


def near_key_mask_of(mask: Tensor | None, near: int | None) -> tuple[bool, Tensor | None, int | None]:
    """Whether a mask of transformers forbids whole keys, and perhaps those further than `near` from a query, only; the
    keys allowed, as `key_mask_of` gives them; and `near` where the mask forbids what is further, else None.

    near: None where no mask does. A query sees itself, unless it is no key that may be seen at all.
    """
    if mask is None or near is None or mask.dim() != 4 or mask.shape[2] == 1 or mask.stride(2) == 0:
        return *key_mask_of(mask), None
    if mask.dtype is not _bool or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return False, None, None
    if not _answer(_sees_near(near), mask):
        return False, None, None
    return True, mask[:, 0].diagonal(dim1=1, dim2=2).contiguous(), near


def for_each(key_mask: Tensor | None, batch: int) -> Tensor | None:
    """[batch, keys] of a mask that may be one for all sequences, [1, keys]."""
    return key_mask if key_mask is None or len(key_mask) == batch else key_mask.expand(batch, -1)


class _Last(threading.local):
    """The mask asked about last by this thread: a reference that does not keep it, its version and the fingerprint of
    all its values, question, answer.
    """

    mask: Callable[[], Tensor | None] = staticmethod(lambda: None)
    version = values = 0
    question: Callable[[Tensor], bool] | None = None
    answer = False


_last = _Last()


def _answer(question: Callable[[Tensor], bool], mask: Tensor) -> bool:
    """question(mask), asked once of a mask that all blocks get; no where a graph cannot ask."""
    if torch.compiler.is_compiling():
        return False
    # The fingerprint reads what the question reads, ten times faster: 11 against 109 us at 8 x 128 x 128 (EPYC). It is
    # enough in inference mode, where tensors have no version.
    version, values = version_of(mask), fingerprint(mask)
    same = _last.mask() is mask and _last.version == version and _last.values == values
    if not same or not values or _last.question is not question:
        _last.answer = question(mask)
        _last.mask, _last.version, _last.values, _last.question = weakref.ref(mask), version, values, question
    return _last.answer


def _repeats_rows(mask: Tensor) -> bool:
    return torch.equal(mask, mask[:, :, :1].expand_as(mask))


@functools.lru_cache(maxsize=8)  # `_answer` knows a question again by being the same object
def _sees_near(near: int) -> Callable[[Tensor], bool]:
    def question(mask: Tensor) -> bool:
        at = torch.arange(mask.shape[3], device=mask.device)
        allowed = mask[:, 0].diagonal(dim1=1, dim2=2)[:, None, None]  # [batch, 1, 1, keys]
        return torch.equal(mask, allowed & ((at[:, None] - at).abs() <= near))

    return question


def _is_causal(mask: Tensor) -> bool:
    queries, keys = mask.shape[2:]
    seen = torch.ones(queries, keys, dtype=_bool, device=mask.device).tril(keys - queries)
    return torch.equal(mask, mask[:, :, -1:] & seen)
