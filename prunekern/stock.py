"""Compact models that transformers loads with no prunekern: the same number of heads and FFN channels in every block.

What the classes of transformers 5 can be told, by their modeling files:

- LLaMA, Mistral, Qwen2 and Qwen3 take `head_dim` from the config (Qwen2's has no such field by itself, but keeps and
  honours one): q and o are [num_attention_heads * head_dim] wide, k and v [num_key_value_heads * head_dim]. Whole
  key/value heads may go, with the query heads that read them. LLaMA's config wants the query heads to divide
  hidden_size. Qwen3's heads stay all the same, as its table has no group for queries and keys.
- BERT, RoBERTa and DistilBERT derive the width of a head, hidden_size / num_attention_heads: fewer heads of the same
  width cannot be said, and only the FFN shrinks (two thirds of the block parameters where it is 4 times as wide).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from . import budget, budget_stock, card, families
from .checkpoint import _is_model_file
from .compact import compact
from .folders import replacing
from .head import plain_head
from .nn import CompactLinear
from .plan import Plan
from .plan import plan as plan_of

if TYPE_CHECKING:
    from .pruner import Pruner

_FFN_WIDTH = {"distilbert": "hidden_dim"}  # others: intermediate_size
_FEWER_HEADS = ("llama", "mistral", "qwen2", "qwen3")  # head_dim is a number of its own
_HEADS_DIVIDE_HIDDEN = ("llama",)


# -- before the masks are final --------------------------------------------------------------------------------------


def head_counts(config) -> tuple[int, ...]:
    """How many heads (of decoders: key/value heads) a stock config of this kind may have, the dense number last."""
    heads, kv = _heads(config)
    if config.model_type not in _FEWER_HEADS:
        return (kv,)
    divides = config.model_type in _HEADS_DIVIDE_HIDDEN
    return tuple(n for n in range(1, kv + 1) if n == kv or not divides or config.hidden_size % (n * heads // kv) == 0)


def choose(pruner: Pruner, logits: budget.Scores) -> tuple[dict[str, Tensor], dict]:
    """(groups that rule "stock" keeps, bool by carrier; what `compare` says of them), by these logits."""
    table, config = pruner.table, pruner.config
    target = (config.sparsity, config.cost)
    worth = budget_stock.worth(table, logits, *target)
    kept = {
        "learned": budget.select_global(table, logits, *target, config.align),
        "stock": budget_stock.select_stock(table, logits, *target, config.align, head_counts(pruner.model.config)),
    }
    score = {rule: budget_stock.kept_score(table, worth, k) for rule, k in kept.items()}
    return kept["stock"], {
        "kept_score": score,
        "given_up": score["learned"] - score["stock"],
        "by_kind": {rule: budget.by_kind(table, table.settle(k)) for rule, k in kept.items()},
    }


def compare(pruner: Pruner) -> dict:
    """What rule "stock" would give up against rule "learned", were the masks made final now. Nothing is changed.

    {"kept_score": {rule: score}, "given_up": their difference, "by_kind": {rule: {kind: [kept, of]}}}. A score is the
    worth of what is kept (`budget_stock.worth`), of the most there is: 1 where just the groups that the logits rank
    above the cut are kept (the learned rule, but for alignment and what it gives back); below 0 where what is kept is
    worth less than nothing at all.
    RuntimeError once the masks are final (logits are lifted then); ValueError where the stock rule would refuse.
    """
    if pruner.finalized:
        raise RuntimeError("stock.compare: the masks are final already; compare before pruner.finalize()")
    return choose(pruner, pruner._logits())[1]


def check_reachable(pruner: Pruner) -> None:
    """ValueError where rule "stock" cannot remove `config.sparsity`, whatever the logits."""
    flat = {c: np.zeros(mask.logits.numel()) for c, mask in pruner.masks.items()}
    config = pruner.config
    if flat:
        counts = head_counts(pruner.model.config)
        budget_stock.select_stock(pruner.table, flat, config.sparsity, config.cost, config.align, counts)


# -- on disk ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_stock(model: nn.Module, path: str | os.PathLike, max_shard_size: str = "5GB") -> None:
    """Write a model to the folder `path` as transformers alone loads it: a smaller dense model of its class.

    model: attached, with masks as `pruner.finalize("stock")` leaves them, or the compact model of such a one; it is
    left untouched. The adapters are merged; what is loaded computes what the masked model does, to rounding. As with
    `save`, the folder is replaced as a whole or not at all, and other files in it are carried over. Weights held in
    bf16 or int8 are written as they are rounded, in the dtype of the embeddings.

    ValueError for a model that is neither, and where the plan is not the same in every block, naming the first layer
    that differs.
    """
    changes = config_changes(model, plan_of(model))
    small = model if any(isinstance(m, CompactLinear) for m in model.modules()) else compact(model)
    config = copy.deepcopy(small.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        stock = type(small)(config)
    with plain_head(small):
        state = {n: _as(t, small.get_input_embeddings().weight.dtype) for n, t in small.state_dict().items()}
        stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    if getattr(small, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(small.generation_config)
    # A card of ours in the old folder is of the model that was there, and says to load it with prunekern.
    own = card.FILE if card.is_ours_to_write(Path(path) / card.FILE) else ""
    with replacing(Path(path), lambda name: _is_model_file(name) or name == own) as folder:
        stock.save_pretrained(folder, max_shard_size=max_shard_size)


def config_changes(model: nn.Module, plan: Plan) -> dict[str, int]:
    """What the stock config of a plan has other than the dense one: heads and width of the FFN.

    ValueError where the blocks of the plan are not alike, or the config cannot say it.
    """
    config = model.config
    blocks = [entry[1] for entry in families.of(model).blocks(model)]
    shapes = [_shape(plan, block, config) for block in blocks]
    (kv, width), first = shapes[0], blocks[0]
    for block, (own_kv, own_width) in zip(blocks, shapes, strict=True):
        if own_kv != kv:
            _refuse(block.v, f"keeps {own_kv} heads, {first.v!r} keeps {kv}")
        if own_width != width:
            _refuse(block.up, f"keeps {own_width} channels, {first.up!r} keeps {width}")
    dense_heads, dense_kv = _heads(config)
    if kv not in head_counts(config):
        accepted = " or ".join(map(str, head_counts(config)))
        _refuse(first.v, f"keeps {kv} of {dense_kv} heads, and a stock {config.model_type} config takes {accepted}")
    if width == 0:
        _refuse(first.up, "keeps no channel")
    changes = {_FFN_WIDTH.get(config.model_type, "intermediate_size"): width}
    if config.model_type in _FEWER_HEADS:
        changes["num_attention_heads"], changes["num_key_value_heads"] = kv * dense_heads // dense_kv, kv
        changes["head_dim"] = plan.layers[first.v].out_features // dense_kv
    return changes


def _shape(plan: Plan, block, config) -> tuple[int, int]:
    """(key/value heads, FFN channels) left in a block. ValueError where other than whole heads and channels went."""
    layers: Mapping = plan.layers
    heads, kv = _heads(config)
    value = layers[block.v]
    dim = value.out_features // kv
    alive = torch.unique(value.rows // dim)
    queries = (alive[:, None] * (heads // kv) + torch.arange(heads // kv)).flatten()
    for name, head in ((block.v, alive), (block.k, alive), (block.q, queries)):
        whole = (head[:, None] * dim + torch.arange(dim)).flatten()
        if not torch.equal(layers[name].rows, whole):
            _refuse(name, f"keeps {layers[name].rows.numel()} rows that are not those of whole heads")
    for name in (block.o, block.down):
        kept, size = layers[name].rows.numel(), layers[name].out_features
        if kept < size:
            _refuse(name, f"keeps {kept} of {size} rows of the residual, all of which a stock model has")
    return alive.numel(), layers[block.up].rows.numel()


def _refuse(layer: str, why: str) -> None:
    raise ValueError(f"save_stock: layer {layer!r} {why}; make the masks final with pruner.finalize('stock')")


def _heads(config) -> tuple[int, int]:
    """Heads, and key/value heads, of a dense config."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
