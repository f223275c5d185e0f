"""What few-bit files hold of a compact model: codes and scales in place of plain weights, made a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..families.wrapped import is_transformers
from ..nn import CompactLinear
from ..nn.plain_state import rounded_to
from .head import Head, is_tied, plain_head, word_embeddings, word_head
from .stored import ROUNDED, Stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def stored_tensors(model: PreTrainedModel, stored: Stored) -> dict[str, Tensor]:
    """The tensors of the files of a compact model, by name; what is not converted shares the model's memory.

    `<layer>.weight` and `.scale` of block linears and of the head of a causal language model as `stored` says, in the
    shapes of `CompactLinear`. Embedding tables in bf16 where anything is in fewer bits than fp32, but for one that the
    head is tied to: it is written once, under its own name, in the head's kind. All else as it is, and so are the
    embedding tables of a model that is none of transformers: nothing tells what reads them.

    ValueError for a model with weights on the meta device, as offload leaves them.
    """
    head = word_head(model)
    tied = head is not None and is_tied(model)
    layers: dict[str, nn.Linear | CompactLinear] = {
        name: m for name, m in model.named_modules() if isinstance(m, CompactLinear) and m is not head
    }
    name_of_head = next((name for name, m in model.named_modules() if m is head), "")
    if head is not None and not tied:
        layers[name_of_head] = head
    rounded = _of_tied_head(model, stored) if tied else None
    with plain_head(model), _as_held(layers.values()):
        tensors: dict[str, Tensor] = dict(model.state_dict())
    meta = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if meta:
        raise ValueError(f"save: weights must be in memory to be stored in few bits ({meta[0]!r} is offloaded)")
    if tied:
        tensors.pop(f"{name_of_head}.weight")
    for name, layer in layers.items():
        kind = stored.head if layer is head else stored.kind(name)
        assert kind is not None
        weight, scale = _as_kind(layer, kind)
        tensors |= {f"{name}.weight": weight} if scale is None else {f"{name}.weight": weight, f"{name}.scale": scale}
        if scale is None:
            tensors.pop(f"{name}.scale", None)
    _narrow_embeddings(model, stored, tensors, rounded)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _of_tied_head(model: PreTrainedModel, stored: Stored) -> tuple[Tensor, Tensor | None]:
    """The table of the embeddings as the head holds it: its own codes where it has such."""
    head = word_head(model)
    assert stored.head is not None
    if isinstance(head, Head) and head.weights == stored.head and stored.head in ROUNDED:
        head.refresh()
        return head.weight.detach(), head.scale
    return rounded_to(stored.head, model.get_input_embeddings().weight.detach())


def _as_kind(layer: nn.Linear | CompactLinear, kind: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(layer, CompactLinear):
        return rounded_to(kind, layer.weight.detach())
    if layer.weights == kind:
        return layer.weight.detach(), layer.scale
    return rounded_to(kind, layer.plain_weight().detach())


def _narrow_embeddings(
    model: PreTrainedModel, stored: Stored, tensors: dict[str, Tensor], rounded: tuple[Tensor, Tensor | None] | None
) -> None:
    """Put what is stored of embedding tables in place of them, and of what is tied to them (heads of masked language
    models): the same tensor for all, so that transformers writes it once.
    """
    if not is_transformers(model):
        return
    first = word_embeddings(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Embedding) or f"{name}.weight" not in tensors:
            continue
        old = tensors[f"{name}.weight"]
        scale = None
        if module is first and rounded is not None:
            new, scale = rounded
        elif stored.weights != "fp32" and old.dtype in (torch.float32, torch.float64):
            new = old.to(torch.bfloat16)
        else:
            continue
        for other, tensor in list(tensors.items()):
            if tensor.data_ptr() == old.data_ptr() and tensor.shape == old.shape:
                tensors[other] = new
        tensors[f"{name}.weight"] = new
        if scale is not None:
            tensors[f"{name}.scale"] = scale


@contextmanager
def _as_held(layers: Iterable[nn.Module]) -> Iterator[None]:
    """State dicts hold codes meanwhile: plain weights of all layers at once would be a copy of the model in fp32."""
    coded = [layer for layer in layers if isinstance(layer, CompactLinear) and layer.scale is not None]
    try:
        for layer in coded:
            layer.say_as_held(True)
        yield
    finally:
        for layer in coded:
            layer.say_as_held(False)
