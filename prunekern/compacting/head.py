"""The output embeddings of causal language models: read at every token, so they run on our kernel, and are held in as
few bytes as the blocks are. They are never pruned.

At one row, [49152, 576] in fp32, PyTorch's product reads 12 GB/s where ours reads 31; the packed copy costs the head's
size in memory once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..nn import CompactLinear


class Head(CompactLinear):
    """A head that stays in the bits it is held in: given the embeddings' weight again, as `tie_weights()` does, one in
    bf16 or int8 is rounded from it anew.
    """

    def __setattr__(self, name, value):
        kind = self.weights if name == "weight" and "weight" in self._parameters else None
        super().__setattr__(name, value)
        if kind in ("bf16", "int8") and value.is_floating_point():
            self.scale = self._packed = None
            self.set_weights(kind)


def word_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a causal language model; None for any other."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return None
    return model.get_output_embeddings()


def is_tied(model: nn.Module) -> bool:
    """Whether output embeddings are the input embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def set_head_weights(model: nn.Module, weights: str) -> None:
    """Hold the head as fp32, bf16 or int8 (see `prunekern.load`); nothing happens to a model without one.

    A tied one in fp32 shares the embeddings' parameter; in fewer bits it is rounded from them, whatever it was before.
    """
    head = word_head(model)
    if head is None:
        return
    if is_tied(model) or not isinstance(head, CompactLinear):
        head = _sharing(model.get_input_embeddings().weight if is_tied(model) else head.weight, head)
        model.set_output_embeddings(head)
    head.set_weights(weights)


@contextmanager
def plain_head(model: nn.Module) -> Iterator[None]:
    """While it lasts, a tied head shares the embeddings' weight: a file then holds them once, and not rounded."""
    head = word_head(model)
    swap = head is not None and is_tied(model) and head.weight is not model.get_input_embeddings().weight
    if swap:
        model.set_output_embeddings(_sharing(model.get_input_embeddings().weight, head))
    try:
        yield
    finally:
        if swap:
            model.set_output_embeddings(head)


def _sharing(weight: nn.Parameter, head: nn.Module) -> Head:
    """A head with this very parameter."""
    shared = Head(weight, head.bias)
    shared.weight = weight
    return shared.train(head.training)
