"""A trained LoRA or DoRA adapter of PEFT as the start of pruning."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families
from ..nn import MaskedDoRALinear
from ..nn.merging import merge
from .attach import attach, task_head
from .config import PruneConfig
from .pruner import Pruner

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Fields of peft.LoraConfig with which a layer computes, or trains, something else than LoRA or DoRA of a weight.
_OTHER_METHODS = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


@dataclasses.dataclass(frozen=True)
class _LowRank:
    """What an adapter holds for one linear: A [r, K], B [N, r], scale, and DoRA's magnitude [N] (LoRA: None)."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None


def from_peft(model: PeftModel, config: PruneConfig | None = None) -> Pruner:
    """Start pruning from a trained PEFT adapter: `attach` to the model inside, with the adapter's numbers.

    model: a `peft.PeftModel` with one active LoRA or DoRA adapter, not merged. It is used up: its transformers model,
    in place, becomes `pruner.model`. With nothing pruned that computes in eval mode what the PEFT model did, to
    rounding. A, B, scale and DoRA's magnitude are the adapter's, layer by layer; a LoRA layer's magnitude is
    ||V + s B A|| by rows, which makes it DoRA that computes the same. The task head comes along from modules_to_save.
    Adapters of linears outside the blocks ("all-linear" has them in poolers and heads) are merged into these, which are
    trained on as they are, whole.

    Rank, scale and dropout are the adapter's whatever `config` says, and `pruner.config` says so: `rank` and
    `alpha` (scale * rank, for rsLoRA too) are what most of its layers have; layers that rank_pattern or alpha_pattern
    set apart keep their own. Linears that `config` adapts and the adapter does not get fresh adapters of
    `pruner.config`. Dropout acts as everywhere here, on the low-rank branch only: PEFT's DoRA drops the input of the
    whole layer. A row of zeros outputs zero (plus bias), where PEFT's DoRA gives NaN.

    ImportError without PEFT. TypeError: `model` is no PeftModel. ValueError, the model left as it was: another method
    than LoRA or DoRA, no or several active adapters, disabled or merged ones, trained biases, a quantised base, a
    target that is no plain linear (an embedding), or shares its weight with one, or is in a block and not adapted by
    `config`, a rank above min(N, K) there, modules_to_save trained outside the task head, and what `attach` refuses.
    """
    lora = import_peft("from_peft").tuners.lora
    config = PruneConfig() if config is None else config
    if not isinstance(config, PruneConfig):
        raise TypeError(f"from_peft: config must be a PruneConfig (got {type(config).__name__})")
    adapter = _only_adapter(model)
    low_ranks = {
        name: _read(name, module, adapter, lora)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, lora.LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }
    if not low_ranks:
        raise ValueError(f"from_peft: adapter {adapter!r} has no layer; expected LoRA or DoRA on linears of the blocks")

    # Tried on a copy without storage first, so that a refusal leaves the model as it was.
    same = _untrained(model, adapter)
    trial = copy.deepcopy(model, {id(p): nn.Parameter(p.detach().to("meta")) for p in model.parameters()})
    dense = _unload(trial, adapter, same)
    fused = families.fused_linears(dense)
    low_ranks = dict(part for name, low in low_ranks.items() for part in _parts(name, low, fused.get(name)))
    families.split(dense)
    blocks = families.of(dense).table(dense).layers
    in_blocks = {name: low_rank for name, low_rank in low_ranks.items() if name in blocks}
    outside = {name: low_rank for name, low_rank in low_ranks.items() if name not in blocks}
    _refuse_misfits(in_blocks, outside, blocks, dense)
    config = _as_the_adapter(config, in_blocks.values(), model.peft_config[adapter].lora_dropout)
    _refuse_trained_outside_head(dense, model, adapter, same)
    _refuse_not_adapted(attach(dense, config), in_blocks)

    pruner = attach(_unload(model, adapter, same), config)
    for name, low_rank in in_blocks.items():
        _fill(pruner.layers[name], low_rank)
    for name, low_rank in outside.items():
        _merge(pruner.model.get_submodule(name), low_rank)
    return pruner


def _only_adapter(model: PeftModel) -> str:
    """The name of the active adapter, refused where it is more than LoRA or DoRA of frozen weights."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise TypeError(
            f"from_peft: model must be a peft.PeftModel (got {type(model).__name__}); "
            "load the adapter with PeftModel.from_pretrained(dense, path)"
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"from_peft: model must have exactly one active adapter (got {active}); call set_adapter")
    adapter: str = active[0]
    own = model.peft_config[adapter]
    method = str(getattr(own.peft_type, "value", own.peft_type))
    if method != "LORA":
        raise ValueError(f"from_peft: adapter {adapter!r} must be LoRA or DoRA (got {method})")
    if own.bias != "none":
        raise ValueError(f"from_peft: adapter {adapter!r} must have bias 'none' (got {own.bias!r}); biases stay frozen")
    for field in _OTHER_METHODS:
        if getattr(own, field, None):
            raise ValueError(
                f"from_peft: adapter {adapter!r} must be plain LoRA or DoRA (got {field}={getattr(own, field)!r})"
            )
    quantised = getattr(getattr(model.base_model.model, "config", None), "quantization_config", None)
    if quantised is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        kind = getattr(kind, "value", kind)
        raise ValueError(f"from_peft: the base model must not be quantised (got {kind!r}); load it in 16 or 32 bits")
    return adapter


def _read(name: str, module: Any, adapter: str, lora: Any) -> _LowRank:
    """The adapter's numbers for one layer, refused where it is not LoRA or DoRA, active, on a plain linear."""
    base = module.get_base_layer()
    variant = getattr(module, "lora_variant", {}).get(adapter)
    is_dora = adapter in module.lora_magnitude_vector
    if type(module) is not lora.Linear or type(base) is not nn.Linear:
        # Subclasses of nn.Linear count as others: quantised ones compute with another weight than `weight`.
        kind = f"{type(module).__module__}.{type(module).__name__} on {type(base).__module__}.{type(base).__name__}"
        raise ValueError(f"from_peft: target {name!r} must be LoRA or DoRA on a torch.nn.Linear (got {kind})")
    if variant is not None and not is_dora:
        raise ValueError(f"from_peft: target {name!r} must be plain LoRA or DoRA (got {type(variant).__name__})")
    if module.merged or module.disable_adapters:
        state, call = ("merged", "unmerge_adapter") if module.merged else ("disabled", "enable_adapter_layers")
        raise ValueError(f"from_peft: the adapter of {name!r} is {state}; call model.{call}() first")
    A, B = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    magnitude = module.lora_magnitude_vector[adapter].weight.detach() if is_dora else None
    return _LowRank(A, B, float(module.scaling[adapter]), magnitude)


def _parts(name: str, low_rank: _LowRank, rows: Mapping[str, int] | None) -> Iterator[tuple[str, _LowRank]]:
    """Of a fused linear, the adapters of its parts: the same A, and the rows of B and of the magnitude that are theirs.

    rows: how many each part has, by its name; None: `name` is no fused linear.
    """
    if rows is None:
        yield name, low_rank
        return
    sizes, m = [*rows.values()], low_rank.magnitude
    magnitudes = [None] * len(sizes) if m is None else m.split(sizes)
    for part, B, magnitude in zip(rows, low_rank.B.split(sizes), magnitudes, strict=True):
        yield f"{name}.{part}", _LowRank(low_rank.A, B, low_rank.scale, magnitude)


def _as_the_adapter(config: PruneConfig, low_ranks: Iterable[_LowRank], dropout: float) -> PruneConfig:
    (rank, scale), _ = Counter((low.A.shape[0], low.scale) for low in low_ranks).most_common(1)[0]
    return dataclasses.replace(config, rank=rank, alpha=scale * rank, dropout=dropout)


def _saved_modules(model: PeftModel, adapter: str) -> Iterator[tuple[str, Any]]:
    """(name, wrapper) of what modules_to_save trains for the adapter."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            yield name, module


def _untrained(model: PeftModel, adapter: str) -> set[tuple[str, str]]:
    """(module, parameter) in modules_to_save that are what the base model has: a head's output embeddings, often."""
    same = set()
    for name, wrapper in _saved_modules(model, adapter):
        saved = dict(wrapper.modules_to_save[adapter].named_parameters(remove_duplicate=False))
        for leaf, original in wrapper.original_module.named_parameters(remove_duplicate=False):
            if torch.equal(saved[leaf], original):
                same.add((name, leaf))
    return same


def _unload(model: PeftModel, adapter: str, same: set[tuple[str, str]]) -> PreTrainedModel:
    """The transformers model inside, PEFT's layers gone and modules_to_save in their places."""
    for name, wrapper in _saved_modules(model, adapter):
        for owner, leaf in same:
            if owner == name:  # the original itself, so that weights that were tied are tied again
                path, _, last = leaf.rpartition(".")
                original = wrapper.original_module.get_parameter(leaf)
                setattr(wrapper.modules_to_save[adapter].get_submodule(path), last, original)
    return model.base_model.unload()


def _refuse_trained_outside_head(
    dense: PreTrainedModel, model: PeftModel, adapter: str, same: set[tuple[str, str]]
) -> None:
    head = {id(p) for p in task_head(dense)}
    for name, _ in _saved_modules(model, adapter):
        for leaf, parameter in dense.get_submodule(name).named_parameters():
            if id(parameter) not in head and (name, leaf) not in same:
                raise ValueError(
                    f"from_peft: modules_to_save must be parts of the task head (got {name!r}, whose {leaf!r} was "
                    "trained); prunekern keeps embeddings and blocks frozen: make it part of the base model"
                )


def _refuse_misfits(
    in_blocks: Mapping[str, _LowRank], outside: Mapping[str, _LowRank], blocks: Iterable[str], dense: PreTrainedModel
) -> None:
    if not in_blocks:
        known = sorted({n.rpartition(".")[2] for n in blocks})
        raise ValueError(
            f"from_peft: the adapter has no linear of a block, which alone are pruned (they end in {known}; got "
            f"{sorted(outside)})"
        )
    for name, low_rank in in_blocks.items():
        (N, K), rank = dense.get_submodule(name).weight.shape, low_rank.A.shape[0]
        if rank > min(N, K):
            raise ValueError(f"from_peft: rank of {name!r}, [{N}, {K}], must be in 1..{min(N, K)} (got {rank})")
    for name in outside:
        weight = dense.get_submodule(name).weight
        for other, parameter in dense.named_parameters(remove_duplicate=False):
            if parameter is weight and other != f"{name}.weight":
                raise ValueError(
                    f"from_peft: target {name!r} must have a weight of its own (it is tied to {other!r}, which the "
                    "adapter would change with it); untie the base model, or train without this target"
                )


def _refuse_not_adapted(pruner: Pruner, low_ranks: Iterable[str]) -> None:
    for name in low_ranks:
        if name not in pruner.layers:
            chosen = pruner.config.preset or list(pruner.config.targets or ())
            raise ValueError(
                f"from_peft: the adapter has {name!r}, which config does not adapt (it adapts {chosen!r}); "
                "use preset 'full', or name it in targets"
            )


@torch.no_grad()
def _fill(layer: MaskedDoRALinear, low_rank: _LowRank) -> None:
    layer.rank, layer.scale = low_rank.A.shape[0], low_rank.scale
    layer.A = nn.Parameter(low_rank.A.to(layer.A, copy=True))
    layer.B = nn.Parameter(low_rank.B.to(layer.B, copy=True))
    layer.refresh()
    if low_rank.magnitude is not None:
        layer.magnitude.copy_(low_rank.magnitude)
    else:
        # By the layer's own norm, so that its rounding cancels and the gain is 1 to the last bit but one.
        layer.magnitude.copy_(torch.where(layer.inv_norm > 0, 1 / layer.inv_norm, 0.0))


@torch.no_grad()
def _merge(linear: nn.Linear, low_rank: _LowRank) -> None:
    """The adapter into the weight, as PEFT computes it: V + s B A, or DoRA's m (V + s B A) / ||V + s B A||."""
    V, A, B = linear.weight, low_rank.A, low_rank.B
    if low_rank.magnitude is None:
        wide = torch.promote_types(V.dtype, torch.float32)
        V.copy_(V.to(wide) + low_rank.scale * (B.to(wide) @ A.to(wide)))
    else:
        V.copy_(merge(V, A, B, low_rank.magnitude, low_rank.scale))
    V.requires_grad_(True)  # as the adapter was; outside the task head it would be frozen, and not be saved


def import_peft(what: str) -> Any:
    """The package peft. ImportError says what needs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{what}: needs PEFT; install it with `pip install peft`") from error
    return peft
