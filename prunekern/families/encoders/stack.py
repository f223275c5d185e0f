"""All blocks of a compact encoder as one C++ call, on the tokens that are no padding where nobody reads those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from ... import _native
from ...nn.hooked import is_hooked
from ..key_masks import for_each, key_mask_of
from ..made_from import MadeFrom
from .blocks import RunsAtOnce
from .step import Starts, Step, run_blocks, takes

if TYPE_CHECKING:
    from typing_extensions import Self

_LEAST = 0.05  # share of padding from which on leaving it out pays for two copies of the states
# Rows that blocks are given at once where sequences stand one after the other. What a block makes between its parts,
# 6 to 15 KB a row, stays in the last cache, and packed weights are read again for the next: a hundredth of its time.
_ROWS = 1024
_ASKS = ("output_hidden_states", "output_attentions")


class Stack:
    """The blocks' own arguments, and what the encoder that calls them was."""

    __slots__ = ("_blocks", "_layers", "_made", "_parameters")

    def __init__(self, encoder: RunsStack, blocks: Sequence[nn.Module], steps: Sequence[Step]):
        self._blocks = tuple((block, type(block)) for block in blocks)
        self._layers = tuple(step.layer for step in steps)
        self._parameters = tuple(parameter for step in steps for parameter in step.parameters)
        made = self._made = MadeFrom(encoder, (encoder.layer, *blocks), ())
        made.also(encoder._modules, "layer")
        made.join([step.made for step in steps])

    def is_fresh(self, layer: nn.ModuleList) -> bool:
        """Whether the blocks still are what the arguments were made of, stand where they stood, are all there are, and
        nobody listens.
        """
        if len(layer) != len(self._blocks) or any(type(block) is not kind for block, kind in self._blocks):
            return False
        return self._made.is_fresh()

    def __call__(self, x: Tensor, mask: Tensor | Starts | None) -> Tensor | None:
        """The last block's output; None where the call is not ordinary. mask: as of a `Step`."""
        return run_blocks(x, mask, None, self._layers, self._parameters)


class RunsStack(nn.Module):
    """To be mixed into transformers' encoder of a family, whose blocks are under `layer`.

    `skips_padding`: whether whoever reads the last hidden states leaves those of padding alone, as the poolings of
    sentence-transformers do: they are then zero, and not computed. Where hidden states or attention weights of blocks
    are asked for, gradients, or a mask of more than keys, blocks are called one by one, with all tokens.
    """

    skips_padding = False
    block: type[Any]  # the family's class of a block
    output: type[Any] = BaseModelOutputWithPastAndCrossAttentions  # what transformers' encoder returns
    layer: nn.ModuleList
    _stack: Stack | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of the class it is mixed into."""
        if not args and self._is_plain(kwargs):
            y = self._at_once(hidden_states, attention_mask)
            if y is not None:
                return self.output(last_hidden_state=y)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As of every module. Where nothing is to be done, which `encode` of sentence-transformers asks at every call,
        no module is set: reading is much cheaper.
        """
        return self if not mode and not any_trains(self) else super().train(mode)

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        asked = (*_ASKS, "is_causal", "encoder_hidden_states", "past_key_values")
        if any(kwargs.get(name) is not None and kwargs[name] is not False for name in asked):
            return False
        config = self.__dict__.get("config")  # not every encoder has it; the model around it asks by hooks, too
        return config is None or not any(getattr(config, name, False) for name in _ASKS)

    def _at_once(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """x: [batch, tokens, hidden] -> the same; None where the blocks must be called."""
        if not takes(x, 0):
            return None
        stack = self._stack
        if stack is None or not stack.is_fresh(self.layer):
            stack = self._stack = self._make_stack()
        if stack is None:
            return None
        y = self._without_padding(stack, x, mask) if self.skips_padding and mask is not None else None
        if y is not None:
            return y
        return stack(x, mask) if takes(x) else None

    @staticmethod
    def _without_padding(stack: Stack, x: Tensor, mask: Tensor) -> Tensor | None:
        """None where there is hardly any."""
        forbids_keys_only, key_mask = key_mask_of(mask)
        key_mask = for_each(key_mask, len(x)) if forbids_keys_only else None
        if key_mask is None:
            return None
        at = key_mask.flatten().nonzero().flatten()  # of the tokens that are left
        if at.numel() > (1 - _LEAST) * key_mask.numel() or not at.numel():
            return None
        rows = x.reshape(-1, x.shape[-1])
        y = torch.zeros_like(rows)
        for first, starts in _groups(key_mask.sum(1).tolist()):
            of_group = at[first : first + starts[-1]]
            part = stack(rows.index_select(0, of_group).unsqueeze(0), starts)  # [1, rows, hidden]
            if part is None:
                return None
            y.index_copy_(0, of_group, part[0])
        return y.view_as(x)

    def _make_stack(self) -> Stack | None:
        blocks: list[Any] = [*self.layer]
        steps = []
        for block in blocks:
            # A subclass of somebody's may compute something else.
            is_own = isinstance(block, RunsAtOnce) and type(block) is self.block
            step = block.fresh_step() if is_own and not is_hooked(block) else None
            if step is None:
                return None
            steps.append(step)
        return Stack(self, blocks, steps) if steps else None

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return {**self.__dict__, "_stack": None}


class RunsPlainStack(RunsStack):
    """Of an encoder that returns no more than hidden states."""

    output = BaseModelOutput


def _groups(lengths: Sequence[int]) -> list[tuple[int, Starts]]:
    """(first row, starts) of groups of sequences, in their order, with about `_ROWS` rows each."""
    groups: list[tuple[int, Starts]] = []
    first, starts = 0, [0]
    for length in lengths:
        if starts[-1] and starts[-1] + length > _ROWS:
            groups.append((first, tuple(starts)))
            first, starts = first + starts[-1], [0]
        starts.append(starts[-1] + length)
    groups.append((first, tuple(starts)))
    return groups


def _any_trains(module: nn.Module) -> bool:
    left: list[Any] = [module]
    while left:  # no call for each: it is asked for a hundred modules at every call of the model
        one = left.pop()
        if one is not None:
            if one.training:
                return True
            left.extend(one._modules.values())
    return False


# A tenth of a millisecond in Python, of the five that one text of half of MiniLM-L6 takes.
any_trains: Callable[[nn.Module], bool] = _native.core().any_trains if _native.available() else _any_trains


def skip_padding(model: nn.Module, skips: bool = True) -> None:
    """Say of every encoder in `model` that can whether it leaves padding out: see `RunsStack`."""
    for module in model.modules():
        if isinstance(module, RunsStack):
            module.skips_padding = skips
