"""Merge the adapters and remove what the masks prune: a new model of the same class, with smaller linears."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import families
from ..families.sentence import around, is_sentence_model
from ..families.wrapped import is_transformers, take_off_mixed_precision, unwrapped
from ..nn import CompactLinear, MaskedDoRALinear, ShrunkDoRALinear, ShrunkLinear
from .asked import warn_if_short
from .plan import LayerPlan, Plan, remember_plan
from .plan import plan as plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def compact(model: PreTrainedModel) -> PreTrainedModel:
    """The compact model of an attached one, which is left untouched: same class, heads and call signature.

    Works on what the masks say now, `finalize`d or not. Its output equals the masked model's in eval mode, without the
    autocast that a Trainer with `bf16` or `fp16` leaves around the masked one's forward pass. The result is in eval
    mode, frozen, ready for `save`. Warns where masks that are not final remove less than was asked for. ValueError for
    a model never attached, or compact already. A model inside `torch.compile` or a data parallel wrapper is taken out
    of it; other wrappers are refused by name. Of a SentenceTransformer or CrossEncoder: a copy around the compact
    model.
    """
    outer = model
    model = unwrapped(model, "compact")
    if any(isinstance(m, CompactLinear) for m in model.modules()):
        raise ValueError(f"compact: {type(model).__name__} is compact already")
    plan = plan_of(model)
    warn_if_short(model, plan)
    linears: dict[str, nn.Linear | MaskedDoRALinear] = {name: model.get_submodule(name) for name in plan.layers}
    # Block linears are not copied: their place is taken by the compact ones.
    small = copy.deepcopy(model, {id(module): nn.Identity() for module in linears.values()})
    take_off_mixed_precision(small)
    families.save_whole(small, False)

    def make(
        name: str, in_index: Tensor | None, out_index: Tensor | None, out_features: int, activation: str
    ) -> CompactLinear:
        weight, bias = _merged(linears[name], plan.layers[name])
        return CompactLinear(weight, bias, in_index, out_index, out_features, activation).to(weight.device)

    families.of(model).rebuild(small, plan, make)
    small = mark(small.requires_grad_(False).eval(), plan)
    return around(outer, model, small) if is_sentence_model(outer) else small


def _merged(module: nn.Linear | MaskedDoRALinear, kept: LayerPlan) -> tuple[Tensor, Tensor | None]:
    if isinstance(module, ShrunkDoRALinear):
        return module.merged()
    if isinstance(module, ShrunkLinear):
        return module.weight.clone(), None if module.bias is None else module.bias.clone()
    if isinstance(module, MaskedDoRALinear):
        return module.merged(kept.rows, kept.cols)
    rows, cols = kept.rows.to(module.weight.device), kept.cols.to(module.weight.device)
    weight = module.weight.index_select(0, rows).index_select(1, cols)  # partners outside the targets
    return weight, None if module.bias is None else module.bias.index_select(0, rows)


def mark(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Write the plan into the model's config, so that every `save_pretrained` carries it; a model that is none of
    transformers remembers it.
    """
    if not is_transformers(model):
        remember_plan(model, plan)
        return model
    from .hf import PrunekernConfig

    heads = families.attention_heads(model)
    model.config.quantization_config = PrunekernConfig(plan=plan.to_dict(), heads=heads)
    return model
