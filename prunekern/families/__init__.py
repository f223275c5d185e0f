"""What prunekern knows of architectures, one file each. `of(model)` finds the family of a model;
`register` tells of models that have none.

`family.Family` says what a family is; `table` has what its channel groups are made of.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

from torch import nn

from . import fused
from .checking import check
from .family import Family, StockConfig
from .groups import attention_group, mlp_group, residual_group
from .own import Own, register, registered, unregister
from .sizes import TOWERS
from .table import COSTS, Group, Layer, Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' `config.model_type`: the module here that knows it. Only that one is imported: each brings its
# architecture's own file of transformers along.
FILES: dict[str, str] = {
    "distilbert": "encoders.distilbert",
    "bert": "encoders.bert",
    "roberta": "encoders.roberta",
    "xlm-roberta": "encoders.xlm_roberta",
    "camembert": "encoders.camembert",
    "electra": "encoders.electra",
    "mpnet": "encoders.mpnet",
    "deberta-v2": "encoders.deberta",
    "vit": "encoders.vit",
    "deit": "encoders.vit",
    **{
        f"{name}{tower}": "encoders.clip"
        for name in ("clip", "siglip", "siglip2")
        for tower in ("", "_text_model", "_vision_model")
    },
    "modernbert": "encoders.modernbert",
    "llama": "decoders.llama",
    "mistral": "decoders.llama",
    "qwen2": "decoders.llama",
    "qwen3": "decoders.llama",
}


def types_in(file: str) -> tuple[str, ...]:
    """The `model_type`s that a module here knows."""
    return tuple(name for name, where in FILES.items() if where == file)


def of(model: nn.Module) -> Family:
    """The family of a transformers model, or of a class that is registered. ValueError for one without a family."""
    own = registered(type(model))
    if own is not None:
        return own
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = of_type(model_type)
    if family is None:
        what = f"model type {model_type!r}" if model_type else "it is no transformers model"
        raise ValueError(
            f"model: {type(model).__name__} has no family ({what}); accepted: {', '.join(sorted(FILES))}, and classes "
            "of your own that prunekern.families.register is told of"
        )
    return family


def own_of(model: nn.Module) -> Own | None:
    """What `register` was told of the model's class; None for the families that prunekern knows."""
    return registered(type(model))


def of_type(model_type: str | None) -> Family | None:
    """The family of transformers' `model_type`; None where there is none."""
    file = FILES.get(model_type or "")
    return None if file is None else cast(Family, importlib.import_module(f".{file}", __name__))


def attention_heads(model: PreTrainedModel) -> int | list[int] | None:
    """Of the dense model, by its config, which no tensor tells; of one of text and images, of both; of a registered
    class None where there is no such number. ValueError as `of`.
    """
    own = own_of(model)
    if own is not None:
        return own.heads(model)
    family, config = of(model), model.config
    towers = [getattr(config, field, None) for field in TOWERS]
    return [tower.num_attention_heads for tower in towers if tower is not None] or family.stock(config).heads


def fused_linears(model: nn.Module) -> fused.Fused:
    """The fused linears of a dense model, by module name, and what their parts are called; few families have any.

    ValueError for an architecture without a family.
    """
    find = getattr(of(model), "fused", None)
    found: fused.Fused = {} if find is None else find(model)
    return found


def split(model: PreTrainedModel) -> None:
    """Give the fused linears of a dense model parts of their own, in place, by which tables, plans and files call
    them. Again: nothing.
    """
    fused.split(model, fused_linears(model))


def splitting(model: PreTrainedModel) -> AbstractContextManager[None]:
    """`split`, taken back where what is tried inside raises."""
    return fused.splitting(model, fused_linears(model))


def save_whole(model: PreTrainedModel, whole: bool = True) -> None:
    """Whether `save_pretrained` of a model with split linears writes them whole, as transformers names them."""
    fused.save_whole(model, fused_linears(model), whole)


def most_tokens(model: PreTrainedModel) -> int | None:
    """The longest sequence a transformers model has positions for, by its family or else its config; None: any."""
    config = model.config
    family = of_type(config.model_type)
    if family is None and (own := own_of(model)) is not None:
        return own.most_tokens(config)
    return getattr(config, "max_position_embeddings", None) if family is None else family.most_tokens(config)


__all__ = [
    "COSTS", "Family", "Group", "Layer", "StockConfig", "Table", "attention_group", "attention_heads", "check",
    "fused_linears", "mlp_group", "most_tokens", "of", "of_type", "register", "residual_group", "save_whole", "split",
    "splitting", "types_in", "unregister",
]  # fmt: skip
