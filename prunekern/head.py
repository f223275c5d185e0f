"""The output embeddings of causal language models: read at every token, so held in as few bytes as the blocks are.

The head itself is never pruned. While it is an ordinary fp32 linear, tied to the input embeddings or not, it stays as
transformers made it: PyTorch's own product reads it as fast as ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .nn import CompactLinear


def word_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a causal language model; None for any other."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return None
    return model.get_output_embeddings()


def is_tied(model: nn.Module) -> bool:
    """Whether output embeddings are the input embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def set_head_weights(model: nn.Module, weights: str) -> None:
    """Hold the head as fp32, bf16 or int8 (see `prunekern.load`); nothing happens to a model without one."""
    head = word_head(model)
    if head is None or (weights == "fp32" and not isinstance(head, CompactLinear)):
        return
    if is_tied(model) and isinstance(head, CompactLinear):
        head = _tied(model, head)  # from the embeddings anew: what an earlier kind has rounded comes back
    if weights != "fp32" and not isinstance(head, CompactLinear):
        head = CompactLinear(head.weight, head.bias)
    model.set_output_embeddings(head.set_weights(weights) if isinstance(head, CompactLinear) else head)


@contextmanager
def plain_head(model: nn.Module) -> Iterator[None]:
    """While it lasts, a tied head shares the embeddings' weight: a file then holds them once, and not rounded."""
    head = word_head(model)
    swap = head is not None and is_tied(model) and isinstance(head, CompactLinear)
    if swap:
        model.set_output_embeddings(_tied(model, head))
    try:
        yield
    finally:
        if swap:
            model.set_output_embeddings(head)


def _tied(model: nn.Module, head: CompactLinear) -> nn.Linear:
    words = model.get_input_embeddings().weight
    linear = nn.Linear(words.shape[1], words.shape[0], bias=head.bias is not None, device="meta")
    linear.weight, linear.bias = words, head.bias
    return linear.train(head.training)
