"""Put masked DoRA on a model, in place."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import families
from ..compacting.asked import Asked, asked_of
from ..families import Table
from ..families.wrapped import is_transformers, unwrapped
from ..machine.bf16_trap import BF16_REASON, bf16_matmul_crashes
from ..nn import ChannelMask, CompactLinear, MaskedDoRALinear
from .budget import most_removable
from .config import PruneConfig
from .pruner import Pruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, config: PruneConfig | None = None) -> Pruner:
    """Replace the targeted linears of `model` by `MaskedDoRALinear`s, in place, and return their `Pruner`.

    Everything is frozen but adapters, magnitudes, mask logits and the task head (what lies outside the base model,
    and its pooler; input and output embeddings stay frozen). A base model alone has no head: its pooler stays frozen,
    too, as a loss of hidden states gives it no gradient; thaw it where the loss reads `pooler_output`.

    A model of a class of your own is taken where `prunekern.families.register` was told of it; it warns unless
    `prunekern.families.check` has tried out what was told, and its task head is what was named there.

    ValueError: an architecture without a family, targets that match nothing, a sparsity the targets cannot reach, an
    align larger than a layer, an activation that is not zero at zero, a model that is attached or compact already, a
    wrapper around the model (`families.wrapped` says which; of `torch.compile` it takes the model out). RuntimeError:
    under bf16 autocast on a CPU whose bf16 products crash.
    """
    config = PruneConfig() if config is None else config
    if not isinstance(config, PruneConfig):
        raise TypeError(f"attach: config must be a PruneConfig (got {type(config).__name__})")
    model = unwrapped(model, "attach", in_place=True)
    for module in model.modules():
        if isinstance(module, (MaskedDoRALinear, CompactLinear)):
            state = "attached" if isinstance(module, MaskedDoRALinear) else "compact"
            raise ValueError(f"attach: model is {state} already; start from the dense model")
    family, own = families.of(model), families.own_of(model)
    _refuse_crashing_autocast(model)
    with families.splitting(model):
        table = family.table(model)
        adapted = _adapted(table, config)
        masked = [name for name in adapted if name in table.groups]
        _refuse_unreachable(table, masked, config)
        for name in adapted:
            _refuse_misfit(name, model.get_submodule(name), config)

    families.save_whole(model)
    head = task_head(model)
    generator = torch.Generator(device="cpu").manual_seed(config.seed)
    model.requires_grad_(False)
    for name in adapted:
        linear: nn.Linear = model.get_submodule(name)
        mask = None
        if name in masked:
            mask = ChannelMask(table.groups[name].count, _row_group(table, name), config.temperature)
        layer = MaskedDoRALinear(
            linear.weight,
            linear.bias,
            rank=config.rank,
            alpha=config.alpha,
            dropout=config.dropout,
            mask=mask if mask is None else mask.to(linear.weight.device),
            norm_grad=config.norm_grad,
            generator=generator,
        )
        layer.train(linear.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for parameter in head:
        parameter.requires_grad_(True)
    asked_of[model] = Asked(config.sparsity, config.cost, config.align)
    if own is not None:
        own.remember(model)
        if not own.is_checked:
            warnings.warn(
                f"attach: the groups that {own.cls.__name__} is registered with were never tried out; wrong ones give "
                "a wrong compact model: call prunekern.families.check(model, *inputs) on the dense model once",
                stacklevel=2,
            )
    return Pruner(model, config, table)


def _adapted(table: Table, config: PruneConfig) -> list[str]:
    """Names of the layers that get adapters, in the model's order."""
    if config.preset == "full":
        return list(table.layers)
    if config.preset == "paper":
        return [n for n in table.layers if n in table.groups and table.groups[n].kind in ("query_key", "value")]
    targets = config.targets or ()
    for target in targets:
        if not any(n == target or n.endswith("." + target) for n in table.layers):
            known = sorted({n.rpartition(".")[2] for n in table.layers})
            raise ValueError(
                f"PruneConfig: targets entry {target!r} matches no block linear; block linears end in {known}"
            )
    return [n for n in table.layers if any(n == t or n.endswith("." + t) for t in targets)]


def _refuse_unreachable(table: Table, masked: list[str], config: PruneConfig) -> None:
    if not masked and config.sparsity > 0:
        raise ValueError(
            f"PruneConfig: sparsity must be 0 when no target carries a channel group (got {config.sparsity}); "
            "keys fall with queries: name the query projection"
        )
    for name in masked:
        if config.align > table.groups[name].count:
            raise ValueError(
                f"PruneConfig: align must be at most {table.groups[name].count}, the channel groups of {name!r} "
                f"(got {config.align})"
            )
    most = most_removable(table, masked, config.cost) if masked else 0.0
    if config.sparsity > most:
        chosen = f"preset {config.preset!r}" if config.preset else f"targets {list(config.targets or ())}"
        raise ValueError(
            f"PruneConfig: sparsity {config.sparsity} is out of reach of {chosen}; "
            f"the most it can remove is {most:.4f} of the block {config.cost}"
        )


def _refuse_misfit(name: str, linear: nn.Module, config: PruneConfig) -> None:
    """Before anything is replaced: a layer that is no plain linear (its adapter would be lost), or a rank too large."""
    if not isinstance(linear, nn.Linear):
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        raise ValueError(f"attach: layer {name!r} must be a torch.nn.Linear (got {kind}); merge its adapter first")
    if not linear.weight.is_floating_point():
        raise ValueError(f"attach: layer {name!r} must hold a floating-point weight (got {linear.weight.dtype})")
    N, K = linear.weight.shape
    if config.rank > min(N, K):
        raise ValueError(f"PruneConfig: rank must be in 1..{min(N, K)} for {name!r}, [{N}, {K}] (got {config.rank})")


def _row_group(table: Table, name: str) -> torch.Tensor | None:
    group = table.groups[name]
    if group.rows.shape[1] == 1 and torch.equal(group.rows.flatten(), torch.arange(group.count, device="cpu")):
        return None
    row_group = torch.empty(table.layers[name].rows, dtype=torch.int64, device="cpu")
    row_group[group.rows] = torch.arange(group.count, device="cpu").unsqueeze(1).expand_as(group.rows)
    return row_group


def task_head(model: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the base model, and of its pooler, but for those shared with it and for output embeddings.

    Of a model of towers (CLIP), whatever is in none of them: projections, the scale of logits, a classifier. Of a
    registered class those that it names, where it does.
    """
    own = families.own_of(model)
    named = None if own is None else own.head(model)
    if named is not None or not is_transformers(model):
        return named or []
    base = getattr(model, "base_model", model)
    towers = [child for child in model.children() if is_transformers(child)] if base is model else []
    words = getattr(model, "get_output_embeddings", lambda: None)()
    pooler = getattr(base, "pooler", None)
    pooled = {id(p) for p in pooler.parameters()} if pooler is not None else set()
    inside = {id(p) for part in towers or [base] for p in part.parameters()}
    inside -= pooled if base is not model else set()
    if words is not None:
        inside.add(id(words.weight))
    for name in () if own is None else own.layers(model):
        inside |= {id(p) for p in model.get_submodule(name).parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def _refuse_crashing_autocast(model: nn.Module) -> None:
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if not (on_cpu and torch.is_autocast_enabled("cpu")):
        return
    if torch.get_autocast_dtype("cpu") == torch.bfloat16 and bf16_matmul_crashes():
        raise RuntimeError(f"attach: bf16 autocast is off limits here: {BF16_REASON}")
