"""Masked models in transformers' files: what a Trainer saves in the middle of a run is one, and loads as one.

The config of a model in training says how it was attached; `from_pretrained` attaches alike before the weights load.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import families
from ..compacting.hf import renamer
from ..compacting.plan import LayerPlan, Plan, check
from ..families.wrapped import is_transformers
from ..nn import MaskedDoRALinear
from .attach import attach
from .config import PruneConfig
from .pruner import Pruner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "prunekern_masked"
FORMAT = 1


@register_quantization_config(METHOD)
class MaskedConfig(QuantizationConfigMixin):
    """`quantization_config` of a masked model: the `PruneConfig` it was attached with, and the state of its pruner."""

    def __init__(
        self, prune_config: dict[str, Any] | None = None, pruner: dict[str, Any] | None = None, format: int = FORMAT,
        **kwargs: Any,
    ):  # fmt: skip
        self.quant_method = METHOD
        self.prune_config, self.pruner, self.format = prune_config, pruner, format

    def to_dict(self) -> dict[str, Any]:
        said = {"prune_config": self.prune_config, "pruner": self.pruner}
        return {"quant_method": METHOD, "format": self.format, **copy.deepcopy(said)}

    def parsed(self) -> tuple[PruneConfig, dict[str, Any]]:
        """ValueError where it is of a newer format, or malformed."""
        if self.format != FORMAT or not isinstance(self.prune_config, dict) or not isinstance(self.pruner, dict):
            raise ValueError(
                f"config.json: quantization_config of a masked model must have format {FORMAT}, prune_config and "
                f"pruner (got format {self.format!r})"
            )
        return PruneConfig.from_dict(self.prune_config), self.pruner

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dict that `to_dict` returns, which transformers takes it for now and then."""
        return self.to_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]


class _OfNow(MaskedConfig):
    """What the config of a model in training holds: says what is so when it is written. Copies no longer change."""

    def __init__(self, pruner: Pruner):
        super().__init__()
        self._pruner = weakref.ref(pruner)

    def to_dict(self) -> dict[str, Any]:
        pruner = self._pruner()
        if pruner is not None:
            self.prune_config, self.pruner = pruner.config.to_dict(), pruner.state_dict()
        return super().to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedConfig:
        return MaskedConfig(**self.to_dict())

    def __reduce__(self) -> Any:
        return _restored, (self.to_dict(),)


def _restored(said: dict[str, Any]) -> MaskedConfig:
    return MaskedConfig(**said)


def say_masked(pruner: Pruner) -> None:
    """Have the model's config say that it is masked, and how, wherever it is written from now on."""
    if is_transformers(pruner.model):
        pruner.model.config.quantization_config = _OfNow(pruner)
        families.save_whole(pruner.model, False)  # its adapters are of the parts, and so are its shrunk layers


class Fits:
    """Makes the pruner's model fit the state that is loaded into it: one that lost its pruned channels is loaded into
    a model that loses them first. `loaded`: whether a state of a masked model came in.
    """

    def __init__(self, pruner: Pruner):
        self._pruner: weakref.ref[Pruner] | None = weakref.ref(pruner)
        self.loaded = False
        pruner.model.register_load_state_dict_pre_hook(self)

    def __call__(self, model: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """torch's hook. ValueError for a state of other kept channels than the model's."""
        pruner = None if self._pruner is None else self._pruner()
        if pruner is None or pruner.model is not model:
            return
        self.loaded = self.loaded or any(f"{prefix}{name}.magnitude" in state for name in pruner.layers)
        kept = {}
        for name, layer in pruner.table.layers.items():
            rows, cols = state.get(f"{prefix}{name}.rows"), state.get(f"{prefix}{name}.cols")
            if rows is None or cols is None:
                return
            kept[name] = LayerPlan(rows.cpu(), cols.cpu(), layer.rows, layer.cols, layer.bias)
        plan = Plan(kept)
        if pruner.shrunk and plan != pruner.plan():
            raise ValueError("load_state_dict: the model has lost other channels than those that the state is without")
        if not pruner.shrunk:
            check(plan, pruner.table)
            pruner.drop(plan)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fits:
        return self._inert()

    def __reduce__(self) -> Any:
        return _inert, ()

    def _inert(self) -> Fits:
        copied = Fits.__new__(Fits)
        copied._pruner, copied.loaded = None, False
        return copied


def _inert() -> Fits:
    return Fits.__new__(Fits)._inert()


@register_quantizer(METHOD)
class MaskedQuantizer(HfQuantizer):
    """Attaches to the skeleton that transformers has made, as the files' config says."""

    quantization_config: MaskedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers builds on the meta device; what an adapter is made of must have storage.
        config, state = self.quantization_config.parsed()
        rename = renamer(model)
        state = dict(state)
        if "low_rank" in state:
            state["low_rank"] = {rename(name): value for name, value in state["low_rank"].items()}
        if state.get("shrunk") is not None:
            plan = Plan.from_dict(state["shrunk"])
            state["shrunk"] = Plan({rename(name): layer for name, layer in plan.layers.items()}).to_dict()
        with torch.device("cpu"):
            for module in model.modules():
                if isinstance(module, nn.Linear) and module.weight.is_meta:
                    module.to_empty(device="cpu")
                    for parameter in module.parameters(recurse=False):
                        nn.init.zeros_(parameter)
            pruner = attach(model, config)
            pruner.load_state_dict(state)
        # They stand in no file: transformers replaces them by others, without values.
        self._buffers = {
            name: buffer for module, name, buffer in _not_stored(model) if module is not None and not buffer.is_meta
        }
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, buffer in self._buffers.items():
            parent, _, own = name.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, own, buffer.to(module.get_buffer(own).device))
        for module in model.modules():
            if isinstance(module, MaskedDoRALinear):
                module.forget_norm()
        model.load_state_dict(model.state_dict())  # the modules look at what has come in
        model.hf_quantizer = None
        model.is_quantized = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _not_stored(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    found = []
    for path, layer in model.named_modules():
        if not isinstance(layer, MaskedDoRALinear) and not getattr(layer, "is_shrunk", False):
            continue
        for inner, module in layer.named_modules(prefix=path):
            found += [
                (module, f"{inner}.{name}", module._buffers[name])
                for name in module._non_persistent_buffers_set
                if module._buffers.get(name) is not None
            ]
    return [(module, name, buffer) for module, name, buffer in found if buffer is not None]
