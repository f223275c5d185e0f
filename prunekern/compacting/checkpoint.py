"""Compact models on disk: safetensors and JSON only, replaced as a whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import nn

from ..families.own import registered, registered_as
from ..families.sentence import is_sentence_model
from ..families.sizes import check_sizes
from ..families.wrapped import is_transformers, unwrapped
from ..nn import CompactLinear
from ..nn.packed import pack_all
from ..ops.packing import WEIGHTS
from ..ops.quantized import ACTIVATIONS_OF_X, TAKE_INT8
from ..storage.folders import replacing
from ..storage.json_files import read_json
from . import card, own_files
from .head import is_tied, plain_head, set_head_weights, word_head
from .held import HEAD, Held
from .plan import dense_sizes
from .plan import plan as plan_of
from .sentence_folders import is_sentence_folder, load_sentence, save_sentence
from .stored import Stored, remember, remembered
from .storing import stored_tensors
from .tensors import dense_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)
# What `save_pretrained` writes, and weights in other forms that would contradict it; a model_card.md is not ours.
_MODEL_FILE = re.compile(
    r"config\.json|prunekern\.json|generation_config\.json|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)


def is_model_file(name: str) -> bool:
    """Whether `save_pretrained` writes a file of that name, or it holds weights in another form."""
    return _MODEL_FILE.fullmatch(name) is not None


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    max_shard_size: str = "5GB",
    command: str | None = None,
    weights: str | None = None,
) -> None:
    """Write a compact model to the folder `path` in transformers' layout: safetensors, config.json with the plan, and a
    model card README.md unless there is one of your own (see `card.model_card`, of command too).

    weights: what the files hold block weights in, and the head of a causal language model: fp32, bf16 (2 bytes a
    weight), int8 (1, and 4 a channel) or int4 (0.5625). Layers that `prunekern.calibrate` found to lose too much are
    stored in the kind that it chose. `load` then gives, to the last bit, the layers that it makes of an fp32 file with
    these weights. In such few-bit files embeddings are bf16 (what is below 2^-9 of a number is lost); norms, biases
    and other heads stay as they are. A head that is tied to the embeddings is stored once, and the embeddings with it,
    in its kind: in int8 and int4 they come back as the rounded numbers (about 42 and 22 dB), where an fp32 file has
    them whole. Older versions refuse few-bit files.
    None: as the files were that the model was loaded from, as long as it was not asked for in another kind. Other
    models are written with the plain values of what they hold: of layers in int8 and int4 in fp32, of those in bf16 in
    bf16.

    The folder is written beside `path` and put in its place in one step: a full disk or a kill leaves the old one
    whole. Other files in the old folder (a tokenizer) are carried over. ValueError for a model that is not compact, for
    other weights, and for few bits of a model that is offloaded or holds infinities or NaN. Wrappers around the model
    are treated as by `compact`.

    A model of a class of your own (`prunekern.families.register`) that is none of transformers has no config: the plan
    is prunekern.json, beside one model.safetensors of its state dict (max_shard_size must be as it is), and `load`
    wants a dense model to read it into. Its embeddings stay as they are.
    """
    if weights is not None:
        check_kinds(weights, "auto", "save")
    if is_sentence_model(model):
        save_sentence(model, path, lambda inner, at: save(inner, at, max_shard_size, command, weights), is_model_file)
        return
    model = unwrapped(model, "save")
    if not any(isinstance(m, CompactLinear) for m in model.modules()):
        raise ValueError(f"save: model is not compact ({type(model).__name__}); call prunekern.compact(model) first")
    stored = _stored_in(model, weights)
    is_own = not is_transformers(model)
    if is_own and max_shard_size != "5GB":
        raise ValueError(
            f"save: max_shard_size must be '5GB', which is not used, for {type(model).__name__}, which is written as "
            f"one file (got {max_shard_size!r})"
        )
    with replacing(
        Path(path), lambda name: is_model_file(name) and not (is_own and name.endswith("config.json"))
    ) as folder:
        if is_own:
            own_files.save_own(model, plan_of(model), folder, stored)
        elif stored is None:
            with plain_head(model):
                # By the names of the plan: transformers would write those that an architecture had first.
                model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
        else:
            tensors = stored_tensors(model, stored)
            with _saying(model, stored):
                model.save_pretrained(
                    folder, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False
                )
        if card.is_ours_to_write(Path(path) / card.FILE):
            (folder / card.FILE).write_text(card.model_card(model, command, stored), encoding="utf-8")


def _stored_in(model: PreTrainedModel, weights: str | None) -> Stored | None:
    """The kinds to write; None for what the model's plain state dict holds."""
    weights = remembered(model) if weights is None else weights
    if weights is None:
        return None
    has_head = word_head(model) is not None
    return Stored.of(weights, plan_of(model).layers, _choice_of(model), has_head, has_head and is_tied(model))


def _choice_of(model: PreTrainedModel) -> Held | None:
    """As `hf.choice_of`, which brings transformers along, of models that may be calibrated."""
    if not is_transformers(model):
        return None
    from .hf import choice_of

    return choice_of(model)


@contextmanager
def _saying(model: PreTrainedModel, stored: Stored) -> Iterator[None]:
    """The model's config says meanwhile what its files store; where all is fp32 there is nothing to say."""
    from .hf import PrunekernConfig

    section: Any = model.config.quantization_config
    config = PrunekernConfig.from_dict(section) if isinstance(section, dict) else section
    model.config.quantization_config = config.as_stored(None if stored.weights == "fp32" else stored)
    try:
        yield
    finally:
        model.config.quantization_config = section


@overload
def load(path: str | os.PathLike[str], weights: str | None = None, activations: str = "auto") -> PreTrainedModel: ...


@overload
def load(path: str | os.PathLike[str], weights: str | None = None, activations: str = "auto", *, into: M) -> M: ...


def load(path: str | os.PathLike[str], weights: str | None = None, activations: str = "auto", into: Any = None) -> Any:
    """The compact model in the folder `path`, of the class that config.json names, in eval mode.

    weights: how block weights are held, fp32, bf16 (half the memory), int8 (a quarter, one scale a channel) or int4 (a
    seventh, one scale for 32 inputs of a channel), and the head of a causal language model, which is read at every
    token too; all else (embeddings, norms, biases, other heads) is fp32. None: as they are stored (see `save`), with
    the very codes and scales of few-bit files. Of these, other kinds are made of the rounded weights: what rounding
    lost does not come back. Layers that `prunekern.calibrate` found to lose too much are held in the kind that it
    chose, where that has more bits than what is asked for. Weights are packed for this machine at once.
    activations: what becomes of what they are multiplied with, where weights are int8 or int4: "float" leaves it,
    "int8" rounds it to 8 bits row by row, and "auto" does so where that is faster with the kernels of this machine.
    How near each comes to float64 is in `prunekern.ops.compact_linear`.

    into: for a model of a class of your own that no config says how to make, and for no other: a dense one, on meta if
    you like, which becomes the compact model and is returned, with tensors of the dtypes that are stored. A class of
    your own that is one of transformers has only to be registered.

    FileNotFoundError where there is no such folder; ValueError for what is not a compact model, or is truncated,
    edited or foreign: the message names file and tensor. Then `into` is left as it was.
    """
    check_kinds(weights, activations, "load")
    path = Path(path)
    if own_files.is_own(path):
        own = own_files.load_own(path, into)
        return set_weights(own, weights, activations).requires_grad_(False).eval()
    if into is not None:
        raise ValueError(
            f"load: into must be None, as config.json in {path} says what to make (got a {type(into).__name__})"
        )
    if is_sentence_folder(path):
        return load_sentence(path, lambda inner: set_weights(inner, weights, activations))
    return _load_pretrained(path, weights, activations)


def _load_pretrained(path: Path, weights: str | None, activations: str) -> PreTrainedModel:
    import transformers

    from . import hf  # noqa: F401  (registers the format)

    config = read_config(path)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != hf.METHOD:
        raise ValueError(f"{path / 'config.json'}: holds no prunekern plan; this is not a compact model")
    names = config.get("architectures") or []
    one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    cls = getattr(transformers, names[0], registered_as(names[0])) if one else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"{path / 'config.json'}: architectures must name one transformers model class, or one that is registered "
            f"with prunekern.families.register (got {names})"
        )
    model_class: type[PreTrainedModel] = cls
    hf.PrunekernConfig.from_dict(section).parsed()  # what is wrong with the plan is said first: it has the widths
    if registered(cls) is None:  # what a config of one's own says by which name is not known
        check_sizes(config, str(path / "config.json"), dense_shapes(path, config), dense_sizes(section.get("plan")))
    with naming(path / "config.json"):
        model, info = model_class.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `info`
        )
    # transformers fills what is missing with random numbers: right for a new head, not for a model saved whole.
    for name, got, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(f"{path}: tensor {name!r} must have shape {list(wanted)} (got {list(got)})")
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{path}: tensor {name!r} is missing")
    for name in sorted(info["unexpected_keys"]):
        raise ValueError(f"{path}: tensor {name!r} is not of this model")
    return set_weights(model, weights, activations).requires_grad_(False).eval()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """What transformers makes of a wrong value in a config, a ZeroDivisionError say, as a ValueError with the file."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{file}: transformers makes no model of it ({type(error).__name__}: {said})") from error


def set_weights(model: PreTrainedModel, weights: str | None, activations: str = "auto") -> PreTrainedModel:
    """Hold the block weights of a compact model, and the head of a causal language model, as fp32, bf16, int8 or int4
    (see `load`, which `prunekern.calibrate` has a say in), and pack them; returns the model. A head that is tied to the
    embeddings is rounded from them anew. None: each as it is held, the head in fp32 where it is not ours yet.

    ValueError for another kind, and for all but fp32 where the model is not compact.
    """
    check_kinds(weights, activations, "set_weights")
    inner: PreTrainedModel = unwrapped(model, "set_weights")
    head, choice = word_head(inner), _choice_of(inner)
    layers = {name: m for name, m in inner.named_modules() if isinstance(m, CompactLinear) and m is not head}
    if not layers and weights not in (None, "fp32"):
        got = f"{type(inner).__name__} without plan"
        raise ValueError(f"set_weights: weights {weights!r} needs a compact model (got {got})")
    if weights is None:
        check_kinds(weights_of(inner), activations, "set_weights")
    elif weights != remembered(inner):
        remember(inner, None)
    for name, layer in layers.items():
        kind = layer.weights if weights is None else weights if choice is None else choice.kind(name, weights)
        x = activations if choice is None else choice.x(name, kind, activations)
        layer.set_weights(kind, _going_with(kind, x))
    as_it_is = head if weights is None and isinstance(head, CompactLinear) else None
    if as_it_is is not None:
        kind = as_it_is.weights
    else:
        kind = weights or "fp32"
        kind = kind if choice is None else choice.head_kind(kind)
    x = _going_with(kind, activations if choice is None else choice.x(HEAD, kind, activations))
    if as_it_is is not None:
        as_it_is.set_weights(kind, x)
    else:
        set_head_weights(inner, kind, x)
    pack_all(inner)
    return model


def weights_of(model: PreTrainedModel) -> str:
    """Of the kinds that block linears are held in, fp32, bf16, int8 and int4, the one of the fewest bits."""
    head = word_head(model)
    kinds = {m.weights for m in model.modules() if isinstance(m, CompactLinear) and m is not head}
    return max(kinds & set(WEIGHTS), key=WEIGHTS.index, default="fp32")


def check_kinds(weights: str | None, activations: str, caller: str) -> None:
    """ValueError unless both are known, and go together. weights: None where it is not known yet."""
    if weights is not None and weights not in WEIGHTS:
        raise ValueError(f"{caller}: weights must be one of {WEIGHTS} (got {weights!r})")
    if activations not in ACTIVATIONS_OF_X:
        raise ValueError(f"{caller}: activations must be one of {ACTIVATIONS_OF_X} (got {activations!r})")
    if weights is not None and _going_with(weights, activations) != activations:
        raise ValueError(
            f"{caller}: activations must be auto or float with {weights} weights (got 'int8'): ask for weights='int8' "
            "or 'int4'"
        )


def _going_with(weights: str, activations: str) -> str:
    """Weights of 16 bits and more, of layers held in more bits than the rest say, are multiplied as is best."""
    return "auto" if activations == "int8" and weights not in TAKE_INT8 else activations


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder. FileNotFoundError or ValueError say what is wrong with it."""
    return read_json(path / "config.json", "a folder written by prunekern.save")
