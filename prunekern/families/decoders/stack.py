"""All blocks of a compact decoder on one token after a cache, as one C++ call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from ...nn.hooked import is_hooked
from ...ops import calls
from ..made_from import MadeFrom
from .blocks import CompactDecoderLayer
from .cache_room import find_room, take
from .step import Step, make_step, run_blocks, takes

if TYPE_CHECKING:
    from transformers import Cache

# What the config may ask for besides the last hidden state.
_ASKS = ("output_attentions", "output_hidden_states")


class Stack:
    """The blocks' own arguments, and what the model that calls them was."""

    __slots__ = ("_layers", "_made")

    def __init__(self, model: CompactDecoderModel, blocks: Sequence[nn.Module], steps: Sequence[Step]):
        self._layers = tuple(step.layer for step in steps)
        made = self._made = MadeFrom(model, (model.layers, *blocks), ())
        made.also(model._modules, "layers")
        config = model.config.__dict__
        made.also(config, "num_hidden_layers", "return_dict", *_ASKS, *(f"_{name}" for name in _ASKS))
        made.join([step.made for step in steps])

    def is_fresh(self) -> bool:
        """Whether the blocks still are what the arguments were made of, stand where they stood, and nobody listens."""
        return self._made.is_fresh()

    def __call__(self, x: Tensor, turns: tuple[Tensor, Tensor], past: Cache) -> Tensor | None:
        """The last block's output, and the cache with the token of x; None where the call is not ordinary."""
        rooms, caches = [], []
        for index in range(len(self._layers)):
            found = find_room(past, index, 1)
            if found is None:
                return None
            tokens = found[1].used + 1
            caches += [found[1].keys.narrow(2, 0, tokens), found[1].values.narrow(2, 0, tokens)]
            rooms.append(found)
        y = run_blocks(x, *turns, tuple(caches), calls.threads(), self._layers)
        if y is not None:
            for (layer, room), keys, values in zip(rooms, caches[::2], caches[1::2], strict=True):
                take(layer, room, keys, values)
        return y


class CompactDecoderModel(nn.Module):
    """To be mixed into transformers' model of a family, around its blocks."""

    config: PretrainedConfig  # transformers looks this up for every subclass of its models
    layers: nn.ModuleList
    embed_tokens: nn.Module
    rotary_emb: nn.Module
    norm: nn.Module
    _stack: Stack | None = None
    _odd: int = 0  # the first block that was no part of a stack, when one was made last

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers'."""
        whole = None
        # Of these False asks for nothing; another value of another argument may ask for anything (return_dict=False).
        asks_more = any(value is not None and not (name in _ASKS and value is False) for name, value in kwargs.items())
        if past_key_values is not None and input_ids is not None and inputs_embeds is None and not asks_more:
            whole = self._whole(input_ids, attention_mask, past_key_values)
        if whole is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
            y = self._at_once(whole, inputs_embeds, position_ids, past_key_values)
            if y is not None:
                return BaseModelOutputWithPast(last_hidden_state=self.norm(y), past_key_values=past_key_values)
        found: BaseModelOutputWithPast = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return found

    def _whole(self, ids: Tensor, mask: Tensor | None, past: Cache) -> Stack | None:
        """The blocks as one call, for one token after those in a cache; None where they must be called."""
        if type(ids) is not Tensor or ids.dim() != 2 or ids.shape[1] != 1 or not calls.short():
            return None
        tokens = past.get_seq_length()
        if not tokens or not _sees_all(mask, len(ids), tokens + 1):
            return None
        stack = self._stack
        if stack is None or not stack.is_fresh():
            stack = self._stack = self._make_stack()
        return stack

    def _at_once(self, stack: Stack, x: Tensor, positions: Tensor | None, past: Cache) -> Tensor | None:
        """What comes out of the blocks, x [batch, 1, hidden] -> the same."""
        if not takes(x, None, past):
            return None
        if positions is None:
            positions = torch.full((1, 1), past.get_seq_length(), dtype=torch.int64, device=x.device)
        return stack(x, self.rotary_emb(x, position_ids=positions), past)

    def _make_stack(self) -> Stack | None:
        blocks: list[Any] = [*self.layers]
        config: Any = self.config
        if config._attn_implementation != "sdpa" or config.num_hidden_layers != len(blocks):
            return None
        if any(getattr(config, name, False) for name in _ASKS) or not getattr(config, "return_dict", True):
            return None
        steps: dict[int, Step] = {}
        # The odd one first: where it still is one, no other needs to be asked.
        for index in dict.fromkeys((min(self._odd, len(blocks) - 1), *range(len(blocks)))):
            block = blocks[index]
            step = None
            if CompactDecoderLayer in type(block).__bases__ and not is_hooked(block):  # a family's own class
                step = block._step if block._step is not None and block._step.is_fresh() else make_step(block)
            if step is None or block.self_attn.layer_idx != index:
                self._odd = index
                return None
            block._step = steps[index] = step
        return Stack(self, blocks, [steps[index] for index in range(len(blocks))])

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles make their own.
        return {**self.__dict__, "_stack": None}


def _sees_all(mask: Tensor | None, batch: int, tokens: int) -> bool:
    """Whether transformers' mask of keys [batch, tokens] forbids none."""
    if mask is None:
        return True
    return type(mask) is Tensor and mask.shape == (batch, tokens) and bool(mask.all())
