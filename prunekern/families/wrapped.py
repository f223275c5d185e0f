"""The model inside what people put around it: unwrapped where that is sure to be right, else refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from .own import registered
from .sentence import is_sentence_model, transformer_in

COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
# Where the module lies that a wrapper of torch's was made of. By name: none of them need be imported.
INSIDE = {
    COMPILED: "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
}
# By package and class: the inner modules that hold these names move from release to release.
REFUSED = {
    ("torch.", "FullyShardedDataParallel"): "it splits the weights; pass the model as it was before, whole",
    ("torch.", "FSDPModule"): "it splits the weights; pass the model as it was before, whole",
    ("deepspeed.", "DeepSpeedEngine"): "it splits the weights; pass the model as it was before, whole",
    ("peft.", "PeftModel"): "pass what its merge_and_unload() returns, or start from prunekern.from_peft",
    ("peft.", "PeftMixedModel"): "pass what its merge_and_unload() returns",
}


def unwrapped(model: nn.Module, who: str, in_place: bool = False) -> Any:
    """The transformers model of `model`, whose module names are those that plans, adapters and checkpoints hold.

    Taken out of `torch.compile`, DistributedDataParallel and DataParallel, and of a model of sentence-transformers.
    who: the caller, for messages. in_place: the caller replaces parameters, which a data parallel wrapper would not
    notice: its gradients would no longer be summed over processes, so that it is refused. ValueError besides,
    naming wrapper and what to pass: weights that are split (FSDP, DeepSpeed), PEFT, a module with the transformers
    model in an attribute, and parts of the model that are wrapped by themselves. A registered class, and what holds
    no transformers model, is returned as it is.
    """
    while (kind := _inside(model)) is not None:
        if in_place and kind != COMPILED:
            raise ValueError(
                f"{who}: model must not be wrapped in {type(model).__name__} yet (its buckets are made of the "
                "parameters there are now); pass model.module, and wrap it afterwards"
            )
        model = getattr(model, INSIDE[kind])
    if is_sentence_model(model):
        model = transformer_in(model, who)
    for (package, name), why in REFUSED.items():
        if any(c.__name__ == name and c.__module__.startswith(package) for c in type(model).__mro__):
            layers = (f", layer {n!r} is a {_named(m)}" for n, m in model.named_modules() if hasattr(m, "base_layer"))
            raise ValueError(f"{who}: model must not be wrapped in {name} ({_named(model)}{next(layers, '')}): {why}")
    if not is_transformers(model) and registered(type(model)) is None:
        _refuse_around(model, who)
    for path, part in model.named_modules():
        if path and (_inside(part) is not None or _is_split(part)):
            inner = INSIDE.get(_inside(part) or "")
            first = f"put model.{path}.{inner} back in its place" if inner else "pass the model as it was before"
            raise ValueError(
                f"{who}: model must not have a wrapped part (got {_named(part)} at {path!r}, which changes the names "
                f"of what is inside): {first}, and wrap afterwards"
            )
    return model


def take_off_mixed_precision(model: nn.Module) -> None:
    """Give `model` its own forward pass back, in place: accelerate's mixed precision, and with it Trainer's `bf16`,
    leaves one under autocast in its place, for good.
    """
    forward = model.__dict__.pop("_original_forward", None)
    if forward is None:
        return
    if getattr(forward, "__func__", None) is type(model).forward:
        model.__dict__.pop("forward", None)
    else:  # somebody else's, from before
        model.forward = forward


def is_transformers(model: nn.Module) -> bool:
    """Whether this is a transformers model itself, not something around one."""
    return "transformers.modeling_utils.PreTrainedModel" in _names(model)


def _refuse_around(model: nn.Module, who: str) -> None:
    for path, part in model.named_modules():
        if path and is_transformers(part):
            raise ValueError(
                f"{who}: model must be the transformers model itself (got {_named(model)} with a {type(part).__name__} "
                f"at {path!r}): pass model.{path}"
            )


def _is_split(module: nn.Module) -> bool:
    names = {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("torch.")}
    return bool(names & {"FullyShardedDataParallel", "FSDPModule"})


def _inside(module: nn.Module) -> str | None:
    return next((name for name in _names(module) if name in INSIDE), None)


def _names(module: nn.Module) -> list[str]:
    return [f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__]


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
