"""Whether the files of a checkpoint hold what a plan says, asked of their headers alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..ops.int4 import groups_of
from ..ops.packing import DTYPES, plain_shape
from ..storage.headers import read_header
from ..storage.shards import Shards
from .plan import Plan
from .stored import NAMES, ROUNDED, Stored

Shape = tuple[int, ...]


class Headers:
    """Shapes and dtypes of the tensors of a checkpoint's files, by the names that they have in `model`.

    rename: from a name in the files to that in the model. said: what says which dtypes they should have, for messages.
    """

    def __init__(
        self, model: nn.Module, files: Iterable[str], rename: Callable[[str], str], said: str = "quantization_config"
    ):
        self._said = said
        self.files = [str(file) for file in files]
        self._tensors: dict[str, tuple[Shape, str, str]] = {}
        for file in self.files:
            for name, (shape, _, _, dtype) in read_header(file).items():
                self._tensors[rename(name)] = shape, dtype, file
        self.where = self.files[0] if len(self.files) == 1 else os.path.dirname(self.files[0])
        self._prefix = getattr(model, "base_model_prefix", "") + "."

    def find(self, tensor: str) -> tuple[Shape, str, str] | None:
        """Shape, dtype (F32, I8, ...) and file; None where there is none of that name."""
        # A headless checkpoint under a model with a head, or the other way round: the prefix comes and goes.
        names = (tensor, tensor.removeprefix(self._prefix), self._prefix + tensor)
        return next((self._tensors[name] for name in names if name in self._tensors), None)

    def check(self, tensor: str, shape: Shape, by: str, dtype: str | None = None) -> None:
        """ValueError, naming file and tensor, unless it is there, of this shape, and of this dtype where one is given.

        by: what says so.
        """
        found = self.find(tensor)
        if found is None:
            raise ValueError(f"{self.where}: tensor {tensor!r} is missing")
        if found[0] != shape:
            raise ValueError(f"{found[2]}: tensor {tensor!r} must have shape {list(shape)} {by} (got {list(found[0])})")
        if dtype not in (None, found[1]):
            raise ValueError(f"{found[2]}: tensor {tensor!r} must be {dtype} by {self._said} (got {found[1]})")


def check_tensors(model: nn.Module, plan: Plan, headers: Headers, stored: Stored | None) -> None:
    """ValueError unless the files hold every block weight, scale and bias of the plan, in its kept shape, and what else
    they hold of the base model in the model's: transformers would make room for what is not before it says so.

    stored: the kinds that they hold; None: plain weights.
    """
    for name, layer in plan.layers.items():
        check_weight(
            headers, name, (layer.rows.numel(), layer.cols.numel()), None if stored is None else stored.kind(name)
        )
        if layer.bias:
            headers.check(f"{name}.bias", (layer.rows.numel(),), "by the plan")
    base = getattr(model, "base_model", model)
    for name, parameter in base.named_parameters():
        if headers.find(name) is not None:
            headers.check(name, tuple(parameter.shape), "by config.json")


def check_weight(
    headers: Headers, name: str, shape: tuple[int, int], kind: str | None, by: str = "by the plan"
) -> None:
    """ValueError unless the files hold the weight `name`.weight [N, K] as `kind`, with its scale.

    kind: None for any plain one. by: what says its shape.
    """
    if kind is None:
        headers.check(f"{name}.weight", shape, by)
        return
    headers.check(f"{name}.weight", plain_shape(*shape, DTYPES[kind]), by, NAMES[kind])
    if kind in ROUNDED:
        scales = (shape[0],) if kind == "int8" else (shape[0], groups_of(shape[1]))
        headers.check(f"{name}.scale", scales, by, "F32" if kind == "int8" else "F16")


def dense_shapes(folder: Path, fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model folder by name, those of int4 as of the plain weights that they stand for.

    fields: of its config. Codes say how many groups of inputs there are, not how many inputs: where `hidden_size` makes
    as many groups, it is that. Raises what `Shards.of_model` does.
    """
    shards, width = Shards.of_model(folder), fields.get("hidden_size")
    shapes = dict(shards.shapes)
    for name, shape in shapes.items():
        if shards.dtypes[name] == NAMES["int4"] and len(shape) == 2:
            most = shape[1] * 2
            if isinstance(width, int) and plain_shape(0, width, DTYPES["int4"])[1] == shape[1]:
                most = width
            shapes[name] = (shape[0], most)
    return shapes


def found_in(headers: Headers, plan: Plan, table: str | None, head: str | None) -> Stored | None:
    """What the files hold by their dtypes alone, where a config does not say; None where nothing is int8 or int4.

    table, head: names of the modules of the input embeddings and of the head of a causal language model, if any.
    """

    def kind(name: str | None, other: str) -> str:
        found = None if name is None else headers.find(f"{name}.weight")
        return other if found is None else {dtype: kind for kind, dtype in NAMES.items()}.get(found[1], other)

    layers = {name: kind(name, "fp32") for name in plan.layers}
    embeddings = kind(table, "fp32")
    of_head = embeddings if head is None or headers.find(f"{head}.weight") is None else kind(head, "fp32")
    few = [each for each in (*layers.values(), embeddings, of_head) if each in ROUNDED]
    if not few:
        return None
    weights = max(few, key=list(NAMES).index)
    return Stored(weights, {name: each for name, each in layers.items() if each != weights}, of_head, embeddings)
