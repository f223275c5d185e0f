"""Registration with transformers: after `import prunekern.hf`, every `AutoModelFor...from_pretrained` loads compact
models. The plan travels in `config.json` under `quantization_config`; before the weights load, the blocks are rebuilt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import families
from ..families.sizes import check_sizes
from .head import word_embeddings, word_head
from .held import Held
from .names import names_in
from .plan import MOST_CHANNELS, Plan, check, dense_sizes
from .restoring import Restoring
from .skeleton import skeleton
from .stored import Stored
from .tensors import Headers, check_tensors, found_in

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

METHOD = "prunekern"
FORMAT = 3  # the newest: 2 has `held`, 3 `stored`


@register_quantization_config(METHOD)
class PrunekernConfig(QuantizationConfigMixin):
    """`quantization_config` of a compact model: format version, plan and, where `calibrate` chose, which layers are
    held in more bits; of few-bit files, the kinds of weights that they store. The latter stands in files only: a model
    in memory has a plain `state_dict()`, and `save_pretrained` writes that.

    The format that is written is the oldest that says it all, so that what is neither calibrated nor in few bits goes
    on loading with older versions. It reads as a mapping too: transformers asks a config in the file, which is a dict,
    and one in a model's config the same questions (`.get("quant_method")`).
    """

    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        format: int | None = None,
        prunekern_version: str | None = None,
        heads: int | list[int] | None = None,
        held: dict[str, Any] | None = None,
        stored: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.quant_method = METHOD
        self.format = format if format is not None else 3 if stored is not None else 1 if held is None else 2
        self.prunekern_version = prunekern_version or _version()
        self.plan = plan
        # Of the dense model, of text and images of both: no tensor tells how many an encoder has. None: an older file.
        self.heads = heads
        self.held = held
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        data = {
            "quant_method": self.quant_method,
            "format": self.format,
            "prunekern_version": self.prunekern_version,
            "heads": self.heads,
            "plan": copy.deepcopy(self.plan),  # whoever changes what he was given leaves the model's plan alone
        }
        data |= {} if self.held is None else {"held": copy.deepcopy(self.held)}
        return data if self.stored is None else data | {"stored": copy.deepcopy(self.stored)}

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dict that `to_dict` returns; so are `[]`, `in`, `len`, `keys`, `values` and `items`."""
        return self.to_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.to_dict()

    def __len__(self) -> int:
        return len(self.to_dict())

    def keys(self) -> KeysView[str]:
        return self.to_dict().keys()

    def values(self) -> ValuesView[Any]:
        return self.to_dict().values()

    def items(self) -> ItemsView[str, Any]:
        return self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        # The mixin is a dataclass without fields: by its own rule any two of them are equal.
        return isinstance(other, PrunekernConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # as of every config of transformers: it can be changed

    def parsed(self) -> Plan:
        """The plan. ValueError when it is missing, malformed or of a newer format, and for a choice, or kinds of stored
        weights, of another plan.
        """
        if type(self.format) is not int or not 1 <= self.format <= FORMAT:
            raise ValueError(
                f"config.json: quantization_config format {self.format!r} was written by prunekern "
                f"{self.prunekern_version}; this version reads up to {FORMAT}. Upgrade prunekern"
            )
        if self.plan is None:
            raise ValueError("config.json: quantization_config has no plan")
        plan = Plan.from_dict(self.plan)
        self.choice(plan)
        self.kinds(plan)
        return plan

    def choice(self, plan: Plan) -> Held | None:
        """What `calibrate` chose; None where it did not. ValueError where it is malformed, or made for another plan."""
        return None if self.held is None else Held.from_dict(self.held, plan)

    def kinds(self, plan: Plan) -> Stored | None:
        """What the files store; None where that is plain weights. ValueError where it is malformed, or of another plan.

        An older format says nothing of it: what stands there all the same is not read.
        """
        if self.stored is None or self.format < 3:
            return None
        return Stored.from_dict(self.stored, plan)

    def as_stored(self, stored: Stored | None) -> PrunekernConfig:
        """The same of files that store these kinds; None: plain weights."""
        data = self.to_dict() | {"format": None, "stored": None if stored is None else stored.to_dict()}
        return PrunekernConfig(**data)


@register_quantizer(METHOD)
class PrunekernQuantizer(HfQuantizer):
    """Rebuilds the blocks compact on the skeleton transformers has made, then checks what the files hold."""

    quantization_config: PrunekernConfig

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """What transformers asks before it makes the model: here sizes are refused that would not end. What a config of
        one's own says by which name is not known.
        """
        if families.of_type(type(config).model_type) is None:
            return config
        plan = self.quantization_config.plan
        # Its layers' names count the blocks; embeddings are compared with their tensors later, on the meta device.
        names = plan.get("layers", ()) if isinstance(plan, dict) else ()
        check_sizes(vars(config), "config.json", dict.fromkeys(names, ()), dense_sizes(plan), MOST_CHANNELS)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        # transformers builds on the meta device: indices are real all the same, only weights have no storage yet.
        with torch.device("cpu"):
            config = self.quantization_config
            said = config.parsed()
            plan, held, stored = _named_for(model, said, config.choice(said), config.kinds(said))
            heads = families.attention_heads(model)
            if self.quantization_config.heads not in (None, heads):
                raise ValueError(
                    f"config.json: the attention heads must be the {self.quantization_config.heads} of the plan's "
                    f"dense model (got {heads})"
                )
            # A new one: the old may be that of another model, whose config was handed to from_pretrained.
            self.quantization_config = PrunekernConfig(
                plan.to_dict(),
                prunekern_version=self.quantization_config.prunekern_version,
                heads=heads,
                held=None if held is None else held.to_dict(),
            )
            families.split(model)
            check(plan, families.of(model).table(model))
            skeleton(model, plan)
            self._restoring = _check_files(model, plan, stored, checkpoint_files)
        self._indices: dict[str, Tensor] = {
            name: buffer for name, buffer in model.named_buffers() if name.endswith(("in_index", "out_index"))
        }
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers has replaced every non-persistent buffer by an uninitialised one: put the kept indices back.
        for name, index in self._indices.items():
            parent, _, buffer = name.rpartition(".")
            module = model.get_submodule(parent)
            device = module.get_buffer(buffer).device  # of weights that are offloaded, where they will be used
            if device.type == "meta":
                raise ValueError(
                    "from_pretrained: offload_buffers must be False (got True): kept indices stand in no file, and "
                    "are a few bytes a channel"
                )
            setattr(module, buffer, index.to(device))
        if self._restoring is not None:
            self._restoring.finish(model)
        # A compact model is an ordinary one: .to(), .float(), .double() and Trainer work on it.
        model.hf_quantizer = None
        model.is_quantized = False
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_files(
    model: PreTrainedModel, plan: Plan, stored: Stored | None, files: list[str] | None
) -> Restoring | None:
    """Hold the files against the plan, and give the skeleton the kinds of weights that they store; None: plain ones.

    files: None where weights come from a state dict, which is a plain one.
    """
    if not files:
        return None
    headers = Headers(model, files, names_in(model))
    if stored is None:  # a config of a model in memory, given with few-bit files, does not say
        names = {module: name for name, module in model.named_modules()}
        head = word_head(model)
        stored = found_in(headers, plan, names.get(word_embeddings(model)), head if head is None else names[head])
    if stored is None:
        check_tensors(model, plan, headers, None)
        return None
    restoring = Restoring(model, plan, stored)
    restoring.check(model, headers)
    return restoring


def _named_for(
    model: PreTrainedModel, plan: Plan, held: Held | None, stored: Stored | None
) -> tuple[Plan, Held | None, Stored | None]:
    """All by the layer names of `model`: a base model's lack the prefix that they have under a task head."""
    rename = renamer(model)
    renamed = Plan({rename(name): layer for name, layer in plan.layers.items()})
    return renamed, held and held.renamed(rename), stored and stored.renamed(rename)


def renamer(model: PreTrainedModel) -> Callable[[str], str]:
    """From layer names of a base model, or of one under a task head, to those of `model`."""
    prefix: str = model.base_model_prefix + "."
    bare, known, modules = model.base_model is model, names_in(model), dict(model.named_modules())

    def rename(name: str) -> str:
        name = known(f"{name}.weight").removesuffix(".weight")
        if name in modules:
            return name
        return name.removeprefix(prefix) if bare else name if name.startswith(prefix) else prefix + name

    return rename


def choice_of(model: PreTrainedModel) -> Held | None:
    """What `calibrate` chose for a compact model; None where it did not, and for any other model."""
    section: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(section, dict) and section.get("quant_method") == METHOD:
        section = PrunekernConfig.from_dict(section)
    if not isinstance(section, PrunekernConfig) or section.held is None:
        return None
    return section.choice(section.parsed())


def _version() -> str:
    from .. import __version__

    return __version__
