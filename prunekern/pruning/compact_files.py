"""`compact` and `save` from file to file, for models larger than memory: one linear is held at a time, no shard.

A linear is the unit, because the row norm of DoRA runs over all columns of a row. Peak memory is two and a half linears
in fp32 (two where the model is in fp32), beside the one that is mapped from its file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor, nn

from .. import families, ops
from ..compacting import card
from ..compacting.checkpoint import is_model_file, naming
from ..compacting.compact import mark
from ..compacting.names import names_in
from ..compacting.plan import Plan, from_kept
from ..nn.merging import merge, pick
from ..storage.folders import replacing
from ..storage.json_files import read_json
from ..storage.progress import Bar
from ..storage.shards import CODES, INDEX, Shards, write_shard
from .adapter import check_adapter, check_base, model_class, model_config, read_adapter
from .attach import attach
from .config import PruneConfig
from .frozen import check_tensor
from .split_shards import SplitShards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # rows that are picked or cast at once: 11 MB in fp32 at 11008 columns


@torch.no_grad()
def compact_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    console: Console | None = None,
) -> Plan:
    """Compact the dense checkpoint in folder `base` by `adapter` (written by `save_adapter`) into folder `out`.

    The files are those of `load_base`, `load_adapter`, `compact` and `save`, and the numbers in them are those of
    `compact` on the trained model, bit for bit; but no model is ever in memory. Returns the plan. `out` is replaced in
    one step when all is written; an error leaves it as it was. FileNotFoundError for a missing file; ValueError for
    one that is damaged, for .bin weights, and for an adapter of another base model: the message names file and tensor.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    source = _Source(Path(base), Path(adapter))
    small = source.compact_skeleton()
    tied = small.all_tied_weights_keys
    tensors = {n: t for n, t in small.state_dict().items() if n not in tied}  # in the order that `save` writes
    source.locate(tensors)
    pattern = "model{suffix}.safetensors"
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=max_shard_size)
    with replacing(Path(out), is_model_file) as folder, Bar(console=console) as bar:
        task = bar.add_task("compacting", total=len(tensors))

        def parts(name: str) -> Iterator[Tensor]:
            yield from source.parts(name)
            bar.advance(task)

        for file, names in shards.filename_to_tensors.items():
            write_shard(folder / file, {n: tensors[n] for n in names}, parts)
        if shards.is_sharded:
            metadata = {"total_parameters": small.num_parameters(), **shards.metadata}
            index = {"metadata": metadata, "weight_map": shards.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        _write_configs(small, Path(base), folder)
        if card.is_ours_to_write(Path(out) / card.FILE):
            (folder / card.FILE).write_text(card.model_card(small), encoding="utf-8")
    return source.plan


class _Source:
    """A base checkpoint and its adapter, checked against each other on models without storage."""

    def __init__(self, base: Path, adapter: Path):
        config, _ = read_adapter(adapter)
        self.cls = model_class(config, adapter)
        self.where, self.trained = adapter, config
        _check_base(base, self.cls.config_class.model_type, adapter)
        shards, self.adapter = Shards.of_model(base), Shards.of_file(adapter / "adapter.safetensors")
        self.config = model_config(config, adapter, shards.shapes, self.adapter.shapes)
        self.config.name_or_path = str(base)
        self.dtype = self.config.dtype or shards.dtype()  # as from_pretrained does

        dense = self._skeleton()
        self.base = SplitShards(
            shards.renamed(names_in(dense)), families.fused_linears(dense), f"{dense.base_model_prefix}."
        )
        self.dense = dense.state_dict()
        self.same = _names_of_each(dense)
        self.prefix = f"{dense.base_model_prefix}."
        pruner = attach(dense, PruneConfig.from_dict(config["prune_config"]))
        pruner.load_state_dict(config["pruner"])
        shapes = {name: torch.empty(shape, device="meta") for name, shape in self.adapter.shapes.items()}
        check_adapter(dense, shapes, adapter)
        self.scales, self.shrunk = {n: layer.scale for n, layer in pruner.layers.items()}, pruner.shrunk
        self.plan = from_kept(pruner.table, {carrier: self._kept(carrier) for carrier in pruner.masks})
        if self.shrunk and self.plan != Plan.from_dict(config["pruner"]["shrunk"]):
            raise ValueError(f"{adapter}: its masks do not keep what the shrunk plan of adapter_config.json keeps")

    def compact_skeleton(self) -> PreTrainedModel:
        """The compact model, weights on the meta device."""
        from ..compacting.skeleton import skeleton

        small = self._skeleton()
        skeleton(small, self.plan)
        return mark(small, self.plan)

    def _skeleton(self) -> PreTrainedModel:
        with torch.device("meta"), naming(self.where / "adapter_config.json"):
            model = self.cls._from_config(self.config, dtype=self.dtype)
        model.tie_weights()
        families.split(model)
        return model

    def _kept(self, carrier: str) -> Tensor:
        logits, threshold = (self.adapter.read(f"{carrier}.mask.{t}").float() for t in ("logits", "threshold"))
        return logits > threshold

    # -- where tensors are -------------------------------------------------------------------------------------

    def locate(self, names: Iterable[str]) -> None:
        """Find every tensor of the compact model before anything is written. ValueError names the first misfit."""
        self.found = {}
        for name in names:
            own = [n for n in self._names(name) if n in self.adapter.shapes]
            self.found[name] = (self.adapter, own[0]) if own else (self.base, self._in_base(name))
        used = {stored for shards, stored in self.found.values() if shards is self.base}
        inside = {found[1] for layer in self.plan.layers if (found := re.match(r"(.*?\.)\d+\.", layer))}
        for stored in sorted(set(self.base.shapes) - used):
            # A head of another task is of no use here; weights in the blocks mean that these are other blocks.
            # One that is known, and not used, is the adapter's: it was made trainable.
            twins = _with_and_without(stored, self.prefix)
            in_block = any(n.startswith(tuple(inside)) for n in twins)
            if in_block and not any(n in self.dense for n in twins) and stored.endswith((".weight", ".bias")):
                raise ValueError(
                    f"{self.base.files[stored]}: tensor {stored!r} is not of this model; "
                    f"the adapter in {self.where} was trained on another base model"
                )

    def _in_base(self, name: str) -> str:
        """Its name in the base checkpoint: with or without the prefix of the base model, or that of a tied twin."""
        at = self.base
        found = []
        for twin in self._names(name):
            found += [n for n in _with_and_without(twin, self.prefix) if n in at.shapes][:1]
        if not found:
            self._refuse_missing(name)
        stored = found[0]
        shape, wanted = at.shapes[stored], tuple(self.dense[name].shape)
        if shape != wanted:
            raise ValueError(
                f"{at.files[stored]}: tensor {stored!r} must have shape {list(wanted)} "
                f"for the adapter in {self.where} (got {list(shape)})"
            )
        values = at.read(stored)
        if values.dtype not in CODES:
            accepted = ", ".join(CODES.values())
            raise ValueError(f"{at.files[stored]}: tensor {stored!r} must be of {accepted} (got {values.dtype})")
        for other in found[1:]:
            if not torch.equal(at.read(other), values):
                raise ValueError(
                    f"{at.files[other]}: tensor {other!r} differs from {stored!r}, to which the adapter's model_config "
                    "ties it; expected the same values, or one of them"
                )
        return stored

    def _refuse_missing(self, name: str) -> None:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for stored in _with_and_without(old, self.prefix):
            if stored in self.base.shapes:
                raise ValueError(
                    f"{self.base.files[stored]}: tensor {stored!r} has a name of old; load the model with transformers "
                    "and save it once"
                )
        raise ValueError(
            f"{self.base.where}: has no tensor {name!r}; the adapter in {self.where} was trained on another base model"
        )

    # -- what they become --------------------------------------------------------------------------------------

    def parts(self, name: str) -> Iterator[Tensor]:
        """The values of a tensor of the compact model, in pieces that follow one another."""
        shards, stored = self.found[name]
        values = shards.read(stored)
        layer, _, leaf = name.rpartition(".")
        if shards is self.base:
            self._check(name, values)
        if layer in self.plan.layers:
            yield self._merged(layer, values) if leaf == "weight" else self._selected(layer, values)
        elif values.dtype is self.dtype:
            yield values
        else:
            yield from (rows.to(self.dtype) for rows in values.split(ROWS))

    def _check(self, name: str, values: Tensor) -> None:
        """ValueError where a frozen tensor of the base is not the one that the adapter was trained with."""
        known = self.trained["fingerprints"]
        there = next((known[n] for n in self._names(name) if n in known), None)
        if there is not None:
            layer = name.rpartition(".")[0]
            is_cut = self.shrunk and layer in self.plan.layers
            check_tensor(name, self._selected(layer, values) if is_cut else values, there, self.where)

    def _names(self, name: str) -> list[str]:
        return self.same.get(name, [name])

    def _selected(self, layer: str, values: Tensor) -> Tensor:
        """Kept rows, and columns where there are any, in the model's dtype."""
        kept = self.plan.layers[layer]
        if self.shrunk and tuple(values.shape) != (kept.out_features, kept.in_features)[: values.dim()]:
            return values.to(self.dtype)  # made trainable: the adapter's own, cut already
        return pick(values, kept.rows, kept.cols, self.dtype)

    def _merged(self, layer: str, V: Tensor) -> Tensor:
        """V: [N, K], as stored -> [rows, cols]."""
        if layer not in self.scales:
            return self._selected(layer, V)  # partners outside the targets
        kept, s = self.plan.layers[layer], self.scales[layer]
        if layer in self.trained["base_norms"] and f"{layer}.weight" not in self.adapter.shapes:
            squares = (ops.row_sqnorm(rows.to(self.dtype, copy=True)).double().sum().item() for rows in V.split(ROWS))
            check_base(self.trained, layer, sum(squares), self.where)
        A, B, magnitude = (self.adapter.read(f"{layer}.{n}") for n in ("A", "B", "magnitude"))
        if self.shrunk:  # the adapter, and the norm, are those of kept rows and columns
            return merge(self._selected(layer, V), A, B, magnitude, s)
        return merge(V, A, B, magnitude, s, kept.rows, kept.cols, self.dtype)


def _check_base(base: Path, model_type: str, adapter: Path) -> None:
    file = base / "config.json"
    config = read_json(file)
    if config.get("quantization_config") is not None:
        raise ValueError(f"{file}: holds a quantization_config; the base must be the dense model")
    if config.get("model_type", model_type) != model_type:
        raise ValueError(
            f"{file}: model_type must be {model_type!r}, which the adapter in {adapter} was trained on "
            f"(got {config['model_type']!r})"
        )


def _names_of_each(model: nn.Module) -> dict[str, list[str]]:
    """By the name of every parameter: all its names, of which tied ones have several."""
    by_identity = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity[id(parameter)].append(name)
    return {name: names for names in by_identity.values() for name in names}


def _with_and_without(name: str, prefix: str) -> tuple[str, ...]:
    """A headless checkpoint under a model with a head, or the other way round: the prefix comes and goes."""
    return name, name.removeprefix(prefix), prefix + name


def _write_configs(small: PreTrainedModel, base: Path, folder: Path) -> None:
    """config.json as `save_pretrained` writes it; generation_config.json of the base, or else of the model."""
    small.config.dtype = str(small.dtype).removeprefix("torch.")
    small.config.architectures = [type(small).__name__]
    small.config.save_pretrained(folder)
    if small.can_generate():
        file = base / "generation_config.json"
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
        else:
            small.generation_config.save_pretrained(folder)
