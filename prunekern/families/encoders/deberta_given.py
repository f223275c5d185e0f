"""What an encoder of DeBERTa gives to all its blocks: the mask, relative positions, and the normed embeddings of
positions. Made once, and known again by the blocks, which then need not look into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.hooked import EVERYWHERE, hooks_of
from ...ops import calls
from ...ops.seen import ALL, FEW, FEW_OF_BUFFER, Seen, is_unchanged


class Known:
    """A tensor that was made here, and what is known of it."""

    __slots__ = ("tensor", "value", "_seen")

    def __init__(self, tensor: Tensor, value: Any = None):
        self.tensor, self.value, self._seen = tensor, value, Seen(tensor, FEW_OF_BUFFER)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this very one, and nobody has written to it."""
        return tensor is self.tensor and self._seen.holds(tensor)


class ReadFrom:
    """Parameters that something was computed from, and modules that must be there and be heard by nobody."""

    def __init__(self, owners: Iterable[nn.Module], fixed: Iterable[tuple[dict[str, Any], str]]):
        """owners: all their parameters are read. fixed: entries of dicts that must stay the very objects they are."""
        self.owners, seen = tuple(owners), []
        self._same: tuple[Any, ...] = tuple(x for owner, key in fixed for x in (owner, key, owner.get(key)))
        for module in self.owners:
            self._same += (module.__dict__, "forward", None)
            for key, parameter in (*module._parameters.items(), *module._buffers.items()):
                holds = module._parameters if key in module._parameters else module._buffers
                self._same += (holds, key, parameter)
                if parameter is not None:
                    seen.append(Seen(parameter, ALL if parameter.dim() < 2 else FEW))
        self._hooks = (*EVERYWHERE, *(hooks for module in self.owners for hooks in hooks_of(module)))
        self._kept = tuple(seen)
        self._seen = tuple(x for one in seen for x in one.entry)

    def is_fresh(self) -> bool:
        """Whether all of that still holds."""
        return is_unchanged(self._same, self._hooks, self._seen)


class Given:
    """Shared by an encoder and the attention of its blocks. Copies and pickles begin with nothing known.

    Several threads may run a model: whoever finds another's tensor here does without, and computes the same.
    """

    def __init__(self) -> None:
        self._mask: Known | None = None
        self._relative: Known | None = None
        self.embeddings: Known | None = None  # its value: what they were made of

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        return Given()

    def __reduce__(self) -> Any:
        return Given, ()

    def see_mask(self, tokens: Tensor, mask: Tensor) -> None:
        """mask [batch, 1, tokens, tokens] was made of `tokens` [batch, tokens], 1 or 0."""
        self._mask = None
        if mask.is_cpu and calls.plain_eager(mask) and bool(((tokens == 0) | (tokens == 1)).all()):
            allowed = tokens.bool()
            self._mask = Known(mask, None if bool(allowed.all()) else allowed)

    def tokens_of(self, mask: Tensor) -> tuple[bool, Tensor | None]:
        """Whether `mask` allows each pair of tokens and nothing else and, if so, which are: bool [batch, tokens], or
        None where all are.
        """
        known = self._mask
        return (False, None) if known is None or not known.is_still(mask) else (True, known.value)

    def relative(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        """Relative positions [1, tokens, tokens], which depend on `key` only: its first entry is `tokens`."""
        known = self._relative
        if known is None or known.value != key or not known.is_still(known.tensor):
            with torch.inference_mode(False):
                self._relative = known = Known(make(), key)
        return known.tensor

    def is_plain(self, relative: Tensor | None, tokens: int) -> bool:
        """Whether these are the relative positions of so many tokens in their order; None is."""
        known = self._relative
        return relative is None or (known is not None and known.is_still(relative) and known.value[0] == tokens)

    def embedded(
        self, owners: tuple[nn.Module, ...], fixed: Iterable[tuple[dict[str, Any], str]], make: Callable[[], Tensor]
    ) -> Tensor:
        """The embeddings of positions as blocks take them, [positions, hidden], made of `owners`: see `ReadFrom`."""
        known = self.embeddings
        if known is not None and known.value.owners == owners:  # not those of a replica
            if known.value.is_fresh() and known.is_still(known.tensor):
                return known.tensor
        made_of = ReadFrom(owners, fixed)  # before: what another thread writes meanwhile is read again
        with torch.inference_mode(False), torch.no_grad():
            self.embeddings = known = Known(make(), made_of)
        return known.tensor
