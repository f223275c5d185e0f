"""Fused linears of a dense model (queries, keys and values in one weight, say) as linears of their own, which is what
is adapted, pruned, packed and saved. Transformers' own forward still runs: it gets what the fused one would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Module name of a fused linear -> names of its parts and how many rows each has, in their order.
Fused = Mapping[str, Mapping[str, int]]


class SplitLinear(nn.Module):
    """Linears of the same inputs, their outputs side by side: in the place of one `nn.Linear`, which it computes."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., rows of all parts]."""
        return torch.cat([part(x) for part in self.children()], -1)

    @property
    def weight(self) -> Tensor:
        """[rows of all parts, in], a copy: transformers' `_init_weights` names the weight that was here."""
        parts: list[Any] = [*self.children()]
        return torch.cat([part.weight for part in parts])


def split(model: PreTrainedModel, fused: Fused) -> dict[str, nn.Linear]:
    """Give each of these linears of a dense model parts of its own, in place; returns those whose places were taken.

    Those that are split already stay. ValueError, nothing changed, for a module that is no plain linear.
    """
    found = {name: model.get_submodule(name) for name in fused}
    linears = {}
    for name, module in found.items():
        if type(module) is nn.Linear:
            linears[name] = module
        elif not isinstance(module, SplitLinear):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise ValueError(f"attach: layer {name!r} must be a torch.nn.Linear (got {kind}); merge its adapter first")
    for name, linear in linears.items():
        _put(model, name, _parts(linear, fused[name]))
    return linears


@contextmanager
def splitting(model: PreTrainedModel, fused: Fused) -> Iterator[None]:
    """`split`, taken back where what is tried inside raises."""
    linears = split(model, fused)
    try:
        yield
    except BaseException:
        for name, linear in linears.items():
            _put(model, name, linear)
        raise


@torch.no_grad()
def join(model: PreTrainedModel) -> None:
    """The other way: every `SplitLinear` of `model`, of plain linears, becomes one `nn.Linear` again, in place."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, SplitLinear):
            parts: list[Any] = [*module.children()]
            weight = torch.cat([part.weight for part in parts])
            biases = [part.bias for part in parts if part.bias is not None]
            _put(model, name, _linear(weight, torch.cat(biases) if biases else None, parts[0]))


def save_whole(model: PreTrainedModel, fused: Fused, whole: bool = True) -> None:
    """Let `save_pretrained` of a model write these linears' tensors whole, by the names of transformers (a masked
    model's are the dense weights), or else by those of their parts.
    """
    if not fused:
        return
    from transformers.core_model_loading import Chunk, WeightConverter

    ours: dict[str, list[str]] = {}  # by the name of the tensor, those of its parts
    for name, parts in fused.items():
        owner = name.rpartition(".")[2]
        ours |= {f"{owner}.{leaf}": [f"{owner}.{p}.{leaf}" for p in parts] for leaf in ("weight", "bias")}
    before = getattr(model, "_weight_conversions", None) or []
    kept = [c for c in before if c.target_patterns not in ours.values()]
    added = [WeightConverter([name], parts, operations=[Chunk(dim=0)]) for name, parts in ours.items() if whole]
    if added or len(kept) < len(before):
        model._weight_conversions = kept + added


@torch.no_grad()
def _parts(linear: nn.Linear, rows: Mapping[str, int]) -> SplitLinear:
    """Copies: parameters in one memory would be written to files as one."""
    weights = linear.weight.split([*rows.values()])
    biases = [None] * len(rows) if linear.bias is None else linear.bias.split([*rows.values()])
    made = (_linear(w.clone(), None if b is None else b.clone(), linear) for w, b in zip(weights, biases, strict=True))
    return SplitLinear(dict(zip(rows, made, strict=True))).train(linear.training)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """Of these numbers; trainable, and in training, as the other is."""
    N, K = weight.shape
    made = nn.Linear(K, N, bias is not None, device="meta", dtype=weight.dtype).train(like.training)
    made.weight = nn.Parameter(weight, like.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias, like.bias.requires_grad)
    return made


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
