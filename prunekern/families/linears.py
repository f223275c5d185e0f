"""What every family needs to describe its linears and to make them compact."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..ops.compact_linear import activate
from .table import Layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Activations with act(0) = 0, by transformers' names: a pruned FFN channel must contribute exactly nothing.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "quick_gelu": "quick_gelu",
}


class Activation(nn.Module):
    """act(z), by our names: in place of transformers' own, which goes by others. Most calls fuse it into the product
    before it.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        """z of any shape -> the same."""
        return activate(z, self.name)

    def extra_repr(self) -> str:
        return self.name


def activation_name(hidden_act: object) -> str:
    """Our name of a transformers activation. ValueError for one whose value at zero is not known to be zero."""
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(
            f"activation must be zero at zero for a pruned channel to vanish; accepted: {known} (got {hidden_act!r})"
        )
    return ACTIVATIONS[hidden_act]


def padded_width(widest: int, most: int) -> int:
    """Of heads that are padded to one width for PyTorch's attention: the widest one's, up to the next multiple of 8.

    In 16 bits, memory-efficient attention takes no other widths with a mask, and flash attention copies to reach one.
    most: a dense head's.
    """
    return max(widest, min(-(-widest // 8) * 8, most))


def dense_layer(model: PreTrainedModel, name: str) -> Layer:
    """The linear of that module name, of the size it had before anything was pruned."""
    module = model.get_submodule(name)
    N, K = getattr(module, "dense_shape", module.weight.shape)  # of a shrunk layer: what it was
    return Layer(name, N, K, module.bias is not None)


def full_or(index: Tensor, size: int) -> Tensor | None:
    """None where `index` is all of [0, size): a contiguous call needs no index."""
    return None if index.numel() == size else index


# make(name, in_index, out_index, out_features, activation) -> the CompactLinear of that layer; in training, the layer
# itself, shrunk (`nn.shrunk`), which is called alike
Make = Callable[[str, Tensor | None, Tensor | None, int, str], nn.Module]
Projections = tuple[nn.Module, nn.Module, nn.Module, nn.Module]  # q, k, v and o of a block, of `make`
