"""Whether the files of a checkpoint hold what a plan says, asked of their headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import nn

from ..storage.headers import read_header
from .plan import Plan


def check_tensors(model: nn.Module, plan: Plan, files: Iterable[str]) -> None:
    """ValueError unless the files hold every block weight and bias of the plan, in its kept shape, and what else they
    hold of the base model in the model's: transformers would make room for what is not before it says so.
    """
    files = [str(f) for f in files]
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        stored.update({name: entry[0] for name, entry in read_header(file).items()})
    where = files[0] if len(files) == 1 else os.path.dirname(files[0])
    prefix = getattr(model, "base_model_prefix", "") + "."
    for name, layer in plan.layers.items():
        wanted: dict[str, tuple[int, ...]] = {"weight": (layer.rows.numel(), layer.cols.numel())}
        if layer.bias:
            wanted["bias"] = (layer.rows.numel(),)
        for part, shape in wanted.items():
            tensor = f"{name}.{part}"
            # A headless checkpoint under a model with a head, or the other way round: the prefix comes and goes.
            got = next((stored[t] for t in (tensor, tensor.removeprefix(prefix), prefix + tensor) if t in stored), None)
            if got is None:
                raise ValueError(f"{where}: tensor {tensor!r} is missing")
            if got != shape:
                raise ValueError(
                    f"{where}: tensor {tensor!r} must have shape {list(shape)} by the plan (got {list(got)})"
                )
    base = getattr(model, "base_model", model)
    for name, parameter in base.named_parameters():
        shape = next((stored[t] for t in (name, prefix + name) if t in stored), tuple(parameter.shape))
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{where}: tensor {name!r} must have shape {list(parameter.shape)} by config.json (got {list(shape)})"
            )
