"""Queries, keys and values packed as one weight, in encoders and decoders alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..nn import CompactAttention
from ..nn.compact_attention import Layers
from ..nn.hooked import is_replaced
from ..ops.packing import is_packable

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PacksTogether(nn.Module):
    """Queries, keys and values as one product: to be mixed into an attention module that has them under `names`, and
    a `CompactAttention` under `ragged`.
    """

    names: tuple[str, str, str]  # of q, k and v in the module
    ragged: CompactAttention
    config: PretrainedConfig  # the module's own, as transformers made it
    scaling: float  # of the logits, transformers'; `ragged` has it, too
    _modules: dict[str, Any]  # q, k and v, if nothing stands in their places, are CompactLinear

    def pack(self) -> None:
        """Pack q, k and v as one where they will be used so."""
        layers = self.packs_together()
        if layers:
            self.ragged.pack_layers(layers)

    def packs_together(self) -> Layers | tuple[()]:
        """See `prunekern.nn.packed.pack_all`."""
        layers = self._layers()
        if is_replaced(*layers):
            return ()
        weights = [layer.weight for layer in layers]
        alike = all(is_packable(w) and w.dtype is weights[0].dtype for w in weights)
        alike = alike and all(layer.activations is layers[0].activations for layer in layers)
        return layers if alike and self.ragged.v_first[-1] > 0 and self._is_plain() else ()

    def _layers(self) -> Layers:
        q, k, v = self.names
        modules = self._modules
        return modules[q], modules[k], modules[v]

    def _is_plain(self) -> bool:
        return self.config._attn_implementation == "sdpa" and not (self.training and self._dropout_rate() > 0)

    def _dropout_rate(self) -> float:
        """Of attention weights; each of the mixed-in classes has a name of its own for it."""
        raise NotImplementedError

    def _runs_ragged(self, x: Tensor, layers: Layers) -> bool:
        if self.ragged.scale != self.scaling:  # somebody set another
            self.ragged.scale = self.scaling
        return self._is_plain() and not is_replaced(*layers) and self.ragged.fuses(x, layers)


def is_shrunk(*layers: nn.Module) -> bool:
    """Whether one of these layers is in training still. Blocks ask `nn.hooked.is_replaced`: of these, and of more."""
    return any(getattr(layer, "is_shrunk", False) for layer in layers)
