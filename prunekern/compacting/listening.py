"""Running a model over batches while someone looks at what its layers read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..families.sizes import IMAGES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, Tensor]  # what a model is called with


class Listener:
    """Sees up to `most_rows` rows of what one linear reads: `see` gets them, as they come."""

    def __init__(self, name: str, module: nn.Module, most_rows: int):
        self.name, self.module = name, module
        self.rows, self.most_rows = 0, most_rows
        self.mask: Tensor | None = None  # [batch, tokens] bool of the batch that runs: which are no padding

    def see(self, x: Tensor) -> None:
        """x: [rows, K] float32, kept columns only, neither empty."""
        raise NotImplementedError

    def is_masked(self, x: Tensor) -> bool:
        """Whether `mask` is of what this layer reads or makes, [batch, tokens, ...]: that of a text is of no image."""
        return self.mask is not None and x.shape[:-1] == self.mask.shape and not self.name.startswith(IMAGES)

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the layer's forward pass."""
        x: Tensor = (args[0] if args else kwargs["x"]).detach()
        layer: Any = self.module
        index, left = getattr(layer, "in_index", None), self.most_rows - self.rows
        if not left or not x.numel() or not layer.weight.numel():
            return
        if self.is_masked(x):
            x = x[self.mask]
        x = x.reshape(-1, x.shape[-1])[:left].float()
        x = x if index is None else x[:, index]
        self.rows += len(x)
        if not bool(x.isfinite().all()):
            raise ValueError(f"calibrate: batches must make finite numbers (layer {self.name!r} reads NaN or infinity)")
        with torch.autocast(x.device.type, enabled=False):
            self.see(x)


def run(model: PreTrainedModel, batches: Iterable[Any], listeners: Sequence[Listener]) -> list[Inputs]:
    """Call the model with batches until every listener has its rows; returns what it was called with.

    ValueError or TypeError for what is no batch, and for none.
    """
    device, used = next(model.parameters()).device, []
    with heard(model, listeners), torch.no_grad():
        for batch in batches:
            inputs = _inputs(batch, device)
            mask = mask_of(inputs)
            for one in listeners:
                one.mask = mask
            model(**inputs)
            used.append(inputs)
            if all(one.rows >= one.most_rows for one in listeners if one.rows):
                break
    if not used:
        raise ValueError("calibrate: batches must hold at least one batch (got none)")
    return used


def mask_of(inputs: Inputs) -> Tensor | None:
    """[batch, tokens] bool: which are no padding; None where nothing says so."""
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


@contextmanager
def heard(model: PreTrainedModel, listeners: Sequence[Listener]) -> Iterator[None]:
    """In eval mode, with the hooks set; as it was afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        model.eval()
        for one in listeners:
            handles.append(one.module.register_forward_pre_hook(one.hear, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _inputs(batch: Any, device: torch.device) -> Inputs:
    if not isinstance(batch, Mapping):
        raise TypeError(f"calibrate: batches must be mappings of tensors (got {type(batch).__name__})")
    inputs = {}
    for name, value in batch.items():
        if name == "labels":
            continue
        try:
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(
                f"calibrate: batches must be of tensors, or lists of equal length ({name!r}: {said})"
            ) from None
        inputs[name] = (tensor if tensor.dim() > 1 else tensor.unsqueeze(0)).to(device)
    return inputs
