"""Going through a model block by block, while what a block reads is what the blocks before it make by then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families
from ..families.family import Block
from .listening import Listener, heard, mask_of, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Look = Callable[[Sequence[Listener]], None]
_CACHES = ("past_key_value", "past_key_values")  # what a block is called with, that it would write to


def walk(model: PreTrainedModel, batches: Iterable[Any], rows: int) -> Iterator[tuple[Block, Look]]:
    """The names of each block's linears, and a function that calls the block with all of its inputs while listeners of
    these linears hear. Whatever weights a block has when the next one is asked for, the next one's inputs are made
    with.

    The model runs once, until the first layer has seen `rows` rows; every block once more for the next one. In memory
    are the hidden states of these batches between two blocks, and what else blocks are called with.
    """
    blocks = families.of(model).blocks(model)
    if not blocks:
        return
    calls = [_Calls(module, i == 0) for i, (module, _) in enumerate(blocks)]
    counted = _Counted(blocks[0][1].q, model.get_submodule(blocks[0][1].q), rows)
    used = run(model, batches, [*calls, counted])
    masks = [mask_of(inputs) for inputs in used]
    states = calls[0].states
    for (module, names), call in zip(blocks, calls, strict=True):

        def look(listeners: Sequence[Listener], module: nn.Module = module, call: _Calls = call) -> None:
            with heard(model, listeners), torch.no_grad():
                for x, mask, (args, kwargs) in zip(states, masks, call.rest, strict=True):
                    for one in listeners:
                        one.mask = mask
                    module(x, *args, **kwargs)

        yield names, look
        with heard(model, []), torch.no_grad():
            for i, (args, kwargs) in enumerate(call.rest):
                made = module(states[i], *args, **kwargs)
                states[i] = made[0] if isinstance(made, tuple) else made


class _Counted(Listener):
    def see(self, x: Tensor) -> None:
        """Rows are counted, and that is all."""


class _Calls(Listener):
    """What a block was called with, batch by batch: hidden states (of the first block, whose are read), all else."""

    def __init__(self, module: nn.Module, first: bool):
        super().__init__("", module, 0)
        self.first = first
        self.states: list[Tensor] = []
        self.rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the block's forward pass."""
        if self.first:
            self.states.append(args[0])
        self.rest.append((args[1:], {name: None if name in _CACHES else value for name, value in kwargs.items()}))
