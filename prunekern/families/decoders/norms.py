"""The root mean square norms of the decoder families, as one call of `prunekern.ops.rms_norm`.

A token of SmolLM2-135M's shape passes 61 of them: 2.5 of 18 ms in PyTorch, six calls each, 0.2 in ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from ...ops import calls, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_f32 = torch.float32


class FastNorm(nn.Module):
    """To be mixed into an RMSNorm of transformers, which stays what it is to `isinstance` and `state_dict`.

    Float32 on the CPU where nothing wants a gradient takes our op; anything else (graphs of torch.compile, where the
    norm is fused with its neighbours, too) takes transformers' own forward.
    """

    weight: nn.Parameter
    variance_epsilon: float
    _parameters: dict[str, Any]  # holds the weight

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        if hidden_states.dtype is _f32 and weight.dtype is _f32 and calls.plain_eager(hidden_states):
            if hidden_states.is_cpu and not calls.needs_grad(hidden_states, weight):
                return rms_norm(hidden_states, weight, self.variance_epsilon)
        y: Tensor = super().forward(hidden_states)
        return y


class CompactLlamaRMSNorm(FastNorm, modeling_llama.LlamaRMSNorm):
    pass


class CompactMistralRMSNorm(FastNorm, modeling_mistral.MistralRMSNorm):
    pass


class CompactQwen2RMSNorm(FastNorm, modeling_qwen2.Qwen2RMSNorm):
    pass


class CompactQwen3RMSNorm(FastNorm, modeling_qwen3.Qwen3RMSNorm):
    pass


_COMPACT = {
    c.__bases__[1]: c for c in (CompactLlamaRMSNorm, CompactMistralRMSNorm, CompactQwen2RMSNorm, CompactQwen3RMSNorm)
}
FAST_NORMS = frozenset(_COMPACT.values())


def make_norms_fast(model: PreTrainedModel) -> None:
    """In place: every RMSNorm of exactly a family's class."""
    for module in model.modules():
        if type(module) in _COMPACT:
            module.__class__ = _COMPACT[type(module)]
