"""The output embeddings of causal language models: read at every token, so they run on our kernel, and are held in as
few bytes as the blocks are. They are never pruned.

At one row, [49152, 576] in fp32, PyTorch's product reads 12 GB/s where ours reads 31; the packed copy costs the head's
size in memory once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ..nn import CompactLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head(CompactLinear):
    """A head that stays in the bits it is held in: given the embeddings' weight again, as `tie_weights()` does, one in
    bf16 or int8 is rounded from it anew.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self.weights if name == "weight" and "weight" in self._parameters else None
        super().__setattr__(name, value)
        if kind in ("bf16", "int8") and value.is_floating_point():
            self.scale = self._packed = None
            self.set_weights(kind)


def word_head(model: PreTrainedModel) -> nn.Linear | CompactLinear | None:
    """The output embeddings of a causal language model; None for any other."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return None
    head: nn.Linear | CompactLinear | None = model.get_output_embeddings()
    return head


def is_tied(model: PreTrainedModel) -> bool:
    """Whether output embeddings are the input embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def set_head_weights(model: PreTrainedModel, weights: str) -> None:
    """Hold the head as fp32, bf16 or int8 (see `prunekern.load`); nothing happens to a model without one.

    A tied one in fp32 shares the embeddings' parameter; in fewer bits it is rounded from them, whatever it was before.
    """
    head = word_head(model)
    if head is None:
        return
    if is_tied(model) or not isinstance(head, CompactLinear):
        source = model.get_input_embeddings() if is_tied(model) else model.get_output_embeddings()
        head = _sharing(source.weight, head)
        model.set_output_embeddings(head)
    head.set_weights(weights)


@contextmanager
def plain_head(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a tied head shares the embeddings' weight: a file then holds them once, and not rounded."""
    head = word_head(model)
    if head is None or not is_tied(model) or head.weight is model.get_input_embeddings().weight:
        yield
        return
    model.set_output_embeddings(_sharing(model.get_input_embeddings().weight, head))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def _sharing(weight: nn.Parameter, head: nn.Linear | CompactLinear) -> Head:
    """A head with this very parameter."""
    shared = Head(weight, head.bias)
    shared.weight = weight
    return shared.train(head.training)
