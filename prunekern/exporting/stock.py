"""Compact models that transformers loads with no prunekern: the same number of heads and FFN channels in every block.

What the config of an architecture can say is its family's to know (`StockConfig`); `pruning.whole_heads` chooses masks
that it can.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import families
from ..compacting import card
from ..compacting.checkpoint import is_model_file
from ..compacting.compact import compact
from ..compacting.head import plain_head, word_embeddings
from ..compacting.plan import Plan
from ..compacting.plan import plan as plan_of
from ..families.family import Block, StockConfig
from ..families.fused import join
from ..families.wrapped import unwrapped
from ..nn import CompactLinear
from ..storage.folders import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def save_stock(model: PreTrainedModel, path: str | os.PathLike[str], max_shard_size: str = "5GB") -> None:
    """Write a model to the folder `path` as transformers alone loads it: a smaller dense model of its class.

    model: attached, with masks as `pruner.finalize("stock")` leaves them, or the compact model of such a one; it is
    left untouched. The adapters are merged; what is loaded computes what the masked model does, to rounding. As with
    `save`, the folder is replaced as a whole or not at all, and other files in it are carried over. Weights held in
    bf16 or int8 are written as they are rounded, in the dtype of the embeddings.

    ValueError for a model that is neither, and where the plan is not the same in every block, naming the first layer
    that differs. Wrappers around the model are treated as by `compact`.
    """
    model = unwrapped(model, "save_stock")
    changes = config_changes(model, plan_of(model))
    small = model if any(isinstance(m, CompactLinear) for m in model.modules()) else compact(model)
    config = copy.deepcopy(small.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        stock = type(small)(config)
    families.split(stock)
    words = word_embeddings(small)
    dtype: torch.dtype = small.dtype if words is None else words.weight.dtype  # type: ignore[assignment]
    with plain_head(small):
        state = {n: _as(t, dtype) for n, t in small.state_dict().items()}
        stock.load_state_dict(state, assign=True)
    join(stock)
    stock.tie_weights()
    if getattr(small, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(small.generation_config)
    # A card of ours in the old folder is of the model that was there, and says to load it with prunekern.
    own = card.FILE if card.is_ours_to_write(Path(path) / card.FILE) else ""
    with replacing(Path(path), lambda name: is_model_file(name) or name == own) as folder:
        stock.save_pretrained(folder, max_shard_size=max_shard_size)


def config_changes(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """What the stock config of a plan has other than the dense one: heads and width of the FFN.

    ValueError where the blocks of the plan are not alike, or the config cannot say it.
    """
    family = families.of(model)
    dense = family.stock(getattr(model, "config", None))
    blocks = [block for _, block in family.blocks(model)]
    shapes = [_shape(plan, block, dense) for block in blocks]
    (kv, width), first = shapes[0], blocks[0]
    for block, (own_kv, own_width) in zip(blocks, shapes, strict=True):
        if own_kv != kv:
            _refuse(block.v, f"keeps {own_kv} heads, {first.v!r} keeps {kv}")
        if own_width != width:
            _refuse(block.up, f"keeps {own_width} channels, {first.up!r} keeps {width}")
    if kv not in dense.head_counts:
        accepted, kind = " or ".join(map(str, dense.head_counts)), model.config.model_type
        _refuse(first.v, f"keeps {kv} of {dense.kv_heads} heads, and a stock {kind} config takes {accepted}")
    if width == 0:
        _refuse(first.up, "keeps no channel")
    changes = {dense.ffn_field: width}
    if dense.has_head_dim:
        changes["num_attention_heads"] = kv * dense.heads // dense.kv_heads
        if hasattr(model.config, "num_key_value_heads"):
            changes["num_key_value_heads"] = kv
        changes["head_dim"] = plan.layers[first.v].out_features // dense.kv_heads
    return changes


def _shape(plan: Plan, block: Block, dense: StockConfig) -> tuple[int, int]:
    """(key/value heads, FFN channels) left in a block. ValueError where other than whole heads and channels went."""
    layers = plan.layers
    value = layers[block.v]
    dim, shared_by = value.out_features // dense.kv_heads, dense.heads // dense.kv_heads
    alive = torch.unique(value.rows // dim)
    queries = (alive[:, None] * shared_by + torch.arange(shared_by, device="cpu")).flatten()
    for name, head in ((block.v, alive), (block.k, alive), (block.q, queries)):
        whole = (head[:, None] * dim + torch.arange(dim, device="cpu")).flatten()
        if not torch.equal(layers[name].rows, whole):
            _refuse(name, f"keeps {layers[name].rows.numel()} rows that are not those of whole heads")
    for name in (block.o, block.down):
        kept, size = layers[name].rows.numel(), layers[name].out_features
        if kept < size:
            _refuse(name, f"keeps {kept} of {size} rows of the residual, all of which a stock model has")
    return alive.numel(), layers[block.up].rows.numel()


def _refuse(layer: str, why: str) -> None:
    raise ValueError(f"save_stock: layer {layer!r} {why}; make the masks final with pruner.finalize('stock')")


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
