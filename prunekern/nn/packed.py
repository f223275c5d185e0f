"""Packed copies of plain weights, and whether they are still copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekern.ops.packing import KIND, is_packable, pack_weight, side_by_side
from prunekern.ops.seen import ALL, FEW, FEW_OF_BUFFER, Seen, is_unchanged

from .offloaded import check_codes


class Packed:
    """The weights of one or several layers, packed as one: their output channels follow one another.

    layers: modules with parameters `weight` [N_i, K] and `bias` [N_i] or None, a buffer `scale` for int8 and int4
    weights, and attributes `kept_in` (K) and `activations` (CompactLinear); all of one K, dtype and `activations`, on
    the CPU. Holds what the ops take:

        weight: panels of [sum N_i, K]
        bias:   float32 [sum N_i], or None where no layer has one
        scale:  float32 [sum N_i], or None unless int8: panels of int4 hold theirs
        activations: what becomes of x

    `is_fresh()` says whether the layers still hold what was packed; `prunekern.ops.seen` says what it can miss. A
    compiled graph asks the same when it runs, by `numbers`: one for each layer's weight. ValueError for weights that do
    not go together, and for codes that offload has lost (`check_codes`).
    """

    __slots__ = ("weight", "bias", "scale", "activations", "numbers", "same", "seen", "_seen")

    def __init__(self, layers: Sequence[Any]):
        weights: list[Tensor] = [layer.weight for layer in layers]
        if not weights or not all(map(is_packable, weights)) or _differ(layers):
            got = ", ".join(f"{list(w.shape)} {w.dtype} on {w.device}" for w in weights)
            raise ValueError(f"Packed: weights must share K and be all {', all '.join(KIND.values())} (got {got})")
        self.activations: str = layers[0].activations
        if any(layer.activations != self.activations for layer in layers):
            got = ", ".join(repr(layer.activations) for layer in layers)
            raise ValueError(f"Packed: activations must be the same of all layers (got {got})")
        if layers[0].scale is not None:
            for layer in layers:
                check_codes(layer)
        self.bias = _joined_bias(layers)
        self.scale = _joined_scale(layers)
        owners: list[tuple[dict[str, Any], str]] = [
            (layer._parameters, name) for name in ("weight", "bias") for layer in layers
        ]
        if layers[0].scale is not None:
            owners += [(layer._buffers, "scale") for layer in layers]
        held = [owner[name] for owner, name in owners]
        # What is used as it is, not copied, may change its values: only its identity counts.
        copied = [t for t in held if t is not None and t is not self.bias and t is not self.scale]
        # Before the packing: what another thread writes meanwhile is packed again.
        scales = [layer._buffers["scale"] for layer in layers]
        self._seen = [Seen(t, _look_at(t, any(t is scale for scale in scales))) for t in copied]
        self.numbers = tuple(seen.number for seen in self._seen[: len(layers)])
        self.weight = _packed_as_one(layers)
        # dict, key, value, and what was seen of the values, as `unchanged` takes them.
        same = [x for (owner, name), t in zip(owners, held, strict=True) for x in (owner, name, t)]
        for layer in layers:
            same += [layer.__dict__, "activations", self.activations]
        self.same = tuple(same)
        self.seen = tuple(x for seen in self._seen for x in seen.entry)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The layers' own weights, then biases, then scales."""
        held = self.same[2::3]
        tensors: tuple[Any, ...] = held[: len(held) - len(self.numbers)]
        return tensors

    def is_fresh(self) -> bool:
        """Whether every tensor packed is still the layer's, and was not written to."""
        return is_unchanged(self.same, (), self.seen)


def _look_at(tensor: Tensor, is_scale: bool) -> int:
    """How `Seen` is to look. int4's scales, 2 bytes for 16 of codes, would otherwise be read in every row, at every
    call: a line of memory each, a ninth of what the weights themselves take.
    """
    if tensor.dim() == 1:
        return ALL
    return FEW_OF_BUFFER if is_scale else FEW


def _differ(layers: Sequence[Any]) -> bool:
    return len({(layer.weight.dtype, layer.kept_in) for layer in layers}) > 1


def _packed_as_one(layers: Sequence[Any]) -> Tensor:
    weights: list[Tensor] = [layer.weight.detach() for layer in layers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if weight.dtype != torch.uint8:
        return pack_weight(weight)
    return pack_weight(weight, torch.cat([layer.scale for layer in layers]))


def _joined_bias(layers: Sequence[Any]) -> Tensor | None:
    biases: list[Tensor | None] = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return None
    first = biases[0]
    if len(layers) == 1 and first is not None and first.dtype == torch.float32:
        return first
    filled = [layer.weight.new_zeros(layer.weight.shape[0], dtype=torch.float32) for layer in layers]
    return torch.cat([z if b is None else b.detach().float() for z, b in zip(filled, biases, strict=True)])


def _joined_scale(layers: Sequence[Any]) -> Tensor | None:
    scale: Tensor | None = layers[0].scale
    if scale is None or layers[0].weight.dtype == torch.uint8:
        return None
    return scale if len(layers) == 1 else torch.cat([layer.scale for layer in layers])


def pack_all(model: nn.Module) -> None:
    """Pack every layer of `model` now instead of at its first call.

    Calls `pack()` of every module that has it. A module that packs layers together (a `Packed` of several) names
    them in `packs_together()`: these are not packed alone too.
    """
    modules: list[Any] = list(model.modules())
    together = [layer for m in modules if hasattr(m, "packs_together") for layer in m.packs_together()]
    done = {id(layer) for layer in together}
    with side_by_side():
        for module in modules:
            if hasattr(module, "pack") and id(module) not in done:
                module.pack()
