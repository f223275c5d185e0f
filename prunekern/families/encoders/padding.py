"""Encoders that leave padding out: their blocks run on the tokens that the mask shows, one sequence after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ...nn.hooked import is_hooked
from ..key_masks import for_each, key_mask_of
from .step import Starts, takes

if TYPE_CHECKING:
    from typing_extensions import Self

_LEAST = 0.05  # share of padding from which on leaving it out pays for two copies of the states


class SkipsPadding(nn.Module):
    """To be mixed into transformers' encoder of a family, whose blocks are under `layer`.

    `skips_padding`: whether whoever reads the last hidden states leaves those of padding alone, as the poolings of
    sentence-transformers do: they are then zero. Otherwise, and where hidden states or attention weights of blocks are
    asked for, gradients, or a mask of more than keys, all tokens are computed.
    """

    skips_padding = False
    layer: nn.ModuleList
    config: Any

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of the class it is mixed into."""
        if self.skips_padding and attention_mask is not None and not args and self._is_plain(kwargs):
            skipped = self._without_padding(hidden_states, attention_mask)
            if skipped is not None:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=skipped)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As of every module. Where nothing is to be done, which `encode` of sentence-transformers asks at every call,
        no module is set: reading is much cheaper.
        """
        return self if not mode and not _any_trains(self) else super().train(mode)

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        asked = ("output_hidden_states", "output_attentions", "is_causal", "encoder_hidden_states", "past_key_values")
        if any(kwargs.get(name) is not None and kwargs[name] is not False for name in asked):
            return False
        return not (self.config.output_hidden_states or getattr(self.config, "output_attentions", False))

    def _without_padding(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """x: [batch, tokens, hidden] -> the same; None where the blocks must be called with all of it."""
        blocks: Any = list(self.layer)
        if not takes(x) or is_hooked(*blocks) or any(not hasattr(block, "at_once") for block in blocks):
            return None
        forbids_keys_only, key_mask = key_mask_of(mask)
        key_mask = for_each(key_mask, len(x)) if forbids_keys_only else None
        if key_mask is None:
            return None
        at = key_mask.flatten().nonzero().flatten()  # of the tokens that are left
        if at.numel() > (1 - _LEAST) * key_mask.numel() or not at.numel():
            return None
        starts: Starts = (0, *key_mask.sum(1).cumsum(0).tolist())
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor | None = rows.index_select(0, at).unsqueeze(0)  # [1, rows, hidden]
        for block in blocks:
            y = block.at_once(y, starts)
            if y is None:
                return None
        assert y is not None
        return torch.zeros_like(rows).index_copy_(0, at, y[0]).view_as(x)


def _any_trains(module: nn.Module) -> bool:
    return module.training or any(_any_trains(child) for child in module._modules.values() if child is not None)


def skip_padding(model: nn.Module, skips: bool = True) -> None:
    """Say of every encoder in `model` that can whether it leaves padding out: see `SkipsPadding`."""
    for module in model.modules():
        if isinstance(module, SkipsPadding):
            module.skips_padding = skips
