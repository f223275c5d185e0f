"""Whether an optimiser has stepped: a pruner counts optimiser steps, not the calls that come after them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..nn import MaskedDoRALinear

_all: weakref.WeakSet[FollowedSteps] = weakref.WeakSet()


class FollowedSteps:
    """Tells whether a training loop's optimiser has moved the parameters of `model`.

    Under gradient accumulation (`accelerator.accumulate`) and where a loss scaler met gradients that are not finite, a
    loop calls `optimizer.step()` and what comes after it, and no step is taken. A call is no step where gradients have
    arrived and no optimiser took them. Steps of every torch optimiser are seen; of what is no `torch.optim.Optimizer`,
    or holds other tensors than the model's (fp32 copies), the moved values are. Where nothing optimises at all, every
    call is a step.

    layers: the adapted ones; the first and the last tell of a backward pass.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MaskedDoRALinear]):
        self.model = weakref.ref(model)
        self.is_led = False  # an optimiser of these parameters is known, or was asked to be made
        self.reached: set[int] = set()  # ids of parameters of these layers that have ever got a gradient
        self._seen_one = False  # a torch optimiser has stepped on them: only such count from then on
        self._arrived = False
        # Of each optimiser that stepped: where it is a fused one under a loss scaler, whether it skipped by itself.
        self._skipped: list[Tensor | None] = []
        self._values: Tensor | None = None
        _all.add(self)
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            follower = me()
            if follower is not None:
                follower._note_gradient(parameter)

        for layer in {layers[0], layers[-1]} if layers else ():
            for parameter in (layer.magnitude, *(() if layer.mask is None else (layer.mask.logits,))):
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(arrived)

    def take(self) -> bool:
        """Whether there was a step since the last call of this."""
        was_step = self._was_step()
        self._arrived = self._arrived and not was_step  # what no optimiser has taken is still there to take
        self._skipped = []
        if was_step:
            self._values = None
        return was_step

    def _was_step(self) -> bool:
        if self._skipped:
            return any(skipped is None or not bool(skipped.any()) for skipped in self._skipped)
        if not self._arrived:
            return True
        if not self.is_led:
            self.is_led = self._has_optimizer()
        if not self.is_led:
            return True
        if self._seen_one:
            return False
        return self._values is not None and not torch.equal(self._values, self._norms())

    def _note_gradient(self, parameter: Tensor) -> None:
        self.reached.add(id(parameter))
        if not self._arrived and not self._seen_one:
            self._values = self._norms()
        self._arrived = True

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of any torch optimiser."""
        model = self.model()
        if model is None:
            return
        own = {id(p) for p in model.parameters()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            found = getattr(optimizer, "found_inf", None)
            self._skipped.append(found if isinstance(found, Tensor) else None)
            self.is_led = self._seen_one = True

    def _has_optimizer(self) -> bool:
        """Whether an optimiser with a parameter of the model's lives: one that was made without `param_groups`."""
        model = self.model()
        own = set() if model is None else {id(p) for p in model.parameters() if p.requires_grad}
        living = [o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer)]
        # One whose constructor failed may live on in a traceback, without groups.
        return any(id(p) in own for o in living for group in getattr(o, "param_groups", ()) for p in group["params"])

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """float64 [2 * trainable parameters], sums and sums of squares: what a step that moves anything changes."""
        model = self.model()
        parameters = [] if model is None else list(model.parameters())
        parts = [p.double() for p in parameters if p.requires_grad and not p.is_meta]
        return torch.stack([f(p).cpu() for p in parts for f in (torch.sum, torch.linalg.vector_norm)])


def _note(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for follower in list(_all):
        follower.note_step(optimizer)


register_optimizer_step_post_hook(_note)
