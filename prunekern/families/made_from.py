"""What the arguments of a whole block's call were made of, and whether the block still is that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..nn.hooked import EVERYWHERE, hooks_of
from ..nn.packed import Packed
from ..ops.quantized import OF_X
from ..ops.seen import is_unchanged


class MadeFrom:
    """Modules that are not called, and what was read of them. Asked at every call, in one call of the core: between
    two layers, whose weights have just gone through the caches, every line of Python comes from memory.
    """

    __slots__ = ("_same", "_hooks", "_seen", "_packed")

    def __init__(self, block: nn.Module, modules: Iterable[nn.Module], packed: Iterable[Packed]):
        """block: it is called itself, and whoever listens to it alone is heard. modules: all those within it that are
        not, which must stay where they are, and have no forward of their own. packed: what their weights became.
        """
        inner = [*modules]
        # dict, key, value, as `unchanged` takes them.
        same: list[Any] = []
        for parent in (block, *inner):
            children = parent._modules
            same += [x for name, child in children.items() for x in (children, name, child) if child in inner]
        for module in inner:
            same += [module.__dict__, "forward", None]
        seen: list[Any] = []
        self._packed = tuple(packed)  # they keep the memory whose addresses are compared
        for one in self._packed:
            same += one.same
            seen += one.seen
        self._same, self._seen = tuple(same), tuple(seen)
        self._hooks = (*EVERYWHERE, *(hooks for module in inner for hooks in hooks_of(module)))

    def also(self, owner: dict[str, Any], *keys: str) -> None:
        """These entries of a module's dict (or of its `_parameters` or `_buffers`) must stay the very objects they are;
        what they hold is read at every call.
        """
        self._same += tuple(x for key in keys for x in (owner, key, owner.get(key)))

    def join(self, others: Iterable[MadeFrom]) -> None:
        """All that others were made from, too: asked in one call."""
        for other in others:
            self._same += other._same
            self._seen += other._seen
            self._hooks += other._hooks[len(EVERYWHERE) :]
            self._packed += other._packed

    def is_fresh(self) -> bool:
        """Whether all of that still holds, and nobody listens to one of the modules."""
        return is_unchanged(self._same, self._hooks, self._seen)


def parts_of(packed: Packed) -> tuple[Any, ...]:
    """A weight as the C++ calls take it."""
    return packed.weight, packed.bias, packed.scale, OF_X[packed.activations]
