"""Going through a model block by block, while what a block reads is what the blocks before it make by then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families
from ..families.family import Block
from .listening import Listener, heard, mask_of, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHES = ("past_key_value", "past_key_values")  # what a block is called with, that it would write to


class Walk:
    """The blocks of a model, one after another.

    The model runs once, until the first layer has seen `rows` rows; `look` and `pass_on` run one block. In memory are
    the hidden states of these batches between two blocks, and what else blocks are called with. used: the batches.
    Blocks of another list of modules, as those of another tower are, begin anew with what they were called with.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Any], rows: int):
        self._model = model
        found = families.of(model).blocks(model)
        parents = {id(child): id(parent) for parent in model.modules() for child in parent.children()}
        lists = [0, *(parents.get(id(module)) for module, _ in found)]
        self.blocks = [
            Called(module, names, lists[number] != lists[number + 1] or not number)
            for number, (module, names) in enumerate(found)
        ]
        counted = [_Counted(names.q, model.get_submodule(names.q), rows) for _, names in found[:1]]
        self.used = run(model, batches, [*self.blocks, *counted])
        self._masks = [mask_of(inputs) for inputs in self.used]
        self._states: list[Tensor] = []  # [batch, tokens, hidden] each

    def look(self, block: Called, listeners: Sequence[Listener]) -> list[Tensor]:
        """Call the block with what it reads while listeners of its linears hear; what it makes, batch by batch."""
        made = []
        if block.first:
            self._states = block.states
        with heard(self._model, listeners), torch.no_grad():
            for x, mask, (args, kwargs) in zip(self._states, self._masks, block.calls, strict=True):
                for one in listeners:
                    one.mask = mask
                y = block.module(x.clone(), *args, **kwargs)
                made.append(y[0] if isinstance(y, tuple) else y)
        return made

    def pass_on(self, block: Called) -> None:
        """What the block makes, with the weights that it has now, is what the next one reads."""
        self._states = self.look(block, [])


class Called(Listener):
    """A block, the names of its linears, and what it was called with, batch by batch: hidden states where it is the
    first, and all else.
    """

    def __init__(self, module: nn.Module, names: Block, first: bool):
        super().__init__("", module, 0)
        self.names, self.first = names, first
        self.states: list[Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the block's forward pass."""
        if self.first:
            self.states.append(args[0].clone())
        self.calls.append((args[1:], {n: None if n in _CACHES else v for n, v in kwargs.items()}))


class _Counted(Listener):
    def see(self, x: Tensor) -> None:
        """Rows are counted, and that is all."""
