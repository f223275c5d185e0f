"""The model as it was before training: masks off, adapters off or as they began. Its weights are there once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nn import MaskedDoRALinear
from .pruner import Pruner


class Original:
    """What an attached model computes now, to be had again at any time of the training, through the same modules.

    Frozen weights are those of the model; what is trained and no block linear's (a task head) is copied, and an adapter
    that has learnt already (from PEFT), with its gain of now. RuntimeError once the pruned channels are dropped
    (`Pruner.shrink`): they are what is asked for.
    """

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self._refuse_shrunk()
        began = {name: _beginning(layer) for name, layer in pruner.layers.items()}
        self._layers = [(layer, began[name]) for name, layer in pruner.layers.items()]
        own = {id(p) for layer in pruner.layers.values() for p in layer.parameters()}
        self._others: list[tuple[nn.Module, str, nn.Parameter]] = []
        copies: dict[int, nn.Parameter] = {}
        for module in pruner.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in own:
                    continue
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self._others.append((module, name, copies[id(parameter)]))

    def _refuse_shrunk(self) -> None:
        if self.pruner.shrunk:
            raise RuntimeError(
                "Original: the pruned channels are dropped (pruner.shrink), and the model as it was with them; train "
                "with shrink=False"
            )

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The model as it was, in eval mode and without gradients, for as long as the context lasts."""
        self._refuse_shrunk()
        model = self.pruner.model
        trains = [module for module in model.modules() if module.training]
        now = [module._parameters[name] for module, name, _ in self._others]
        try:
            for module in trains:
                module.training = False
            for layer, began in self._layers:
                layer.began = began
            for module, name, parameter in self._others:
                module._parameters[name] = parameter
            with torch.no_grad():
                yield model
        finally:
            for (module, name, _), trained in zip(self._others, now, strict=True):
                module._parameters[name] = trained
            for layer, _ in self._layers:
                layer.began = None
            for module in trains:
                module.training = True


@torch.no_grad()
def _beginning(layer: MaskedDoRALinear) -> tuple[()] | tuple[Tensor, Tensor, Tensor]:
    """Empty where the layer computes V x: no adapter has learnt, and the magnitude is the norm of the rows."""
    gain = layer.gain(None)
    if not layer.B.any() and torch.allclose(gain, torch.ones_like(gain), rtol=1e-5):
        return ()
    return layer.A.detach().clone(), layer.B.detach().clone(), gain.clone()
