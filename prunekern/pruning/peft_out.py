"""An unpruned run as a DoRA adapter that PEFT loads."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import families
from ..families.wrapped import unwrapped
from ..storage.folders import replacing
from .attach import task_head
from .embeddings import embedding_names
from .peft_in import import_peft
from .pruner import Pruner

# PEFT's task of a transformers class: AutoPeftModelFor... wants it in the file.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
}
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def to_peft(pruner: Pruner, path: str | os.PathLike[str]) -> None:
    """Write an unpruned run to the folder `path` as a DoRA adapter of PEFT: `PeftModel.from_pretrained(dense, path)`.

    dense is the model as `attach` found it; what PEFT loads then computes in eval mode what the masked model does, to
    rounding, and needs no prunekern. adapter_config.json and adapter_model.safetensors are written by PEFT itself,
    with the task head in modules_to_save (whole modules: output embeddings come along where they are part of one), and
    embeddings where tokens were added to the base, as `save_adapter` tells.
    Masks and the state of pruning are not written; `save_adapter` does. The folder is replaced in one step, other
    files in it stay; the model is left as it was, random numbers included.

    ImportError without PEFT. ValueError: masks that prune anything, a model shrunk already, a row of V + s B A that is
    all zero (PEFT divides by its norm and gives NaN), parameters trained besides adapters, masks and task head, and
    adapted linears that are one fused linear in transformers (ModernBERT).
    """
    peft = import_peft("to_peft")
    unwrapped(pruner.model, "to_peft")
    _refuse_pruned(pruner)
    _refuse_split(pruner)
    _refuse_zero_rows(pruner)
    modules_to_save = _head_modules(pruner)
    with torch.random.fork_rng():  # PEFT draws an A, then overwritten: training must not notice
        model = peft.get_peft_model(_dense(pruner), _lora_config(peft, pruner, modules_to_save))
    for name, layer in pruner.layers.items():
        theirs = model.base_model.model.get_submodule(name)
        if theirs.r["default"] != layer.rank or not math.isclose(theirs.scaling["default"], layer.scale):
            raise RuntimeError(f"to_peft: PEFT gave {name!r} another rank or scale; its patterns match other layers")
        theirs.lora_A["default"].weight = nn.Parameter(layer.A.detach())
        theirs.lora_B["default"].weight = nn.Parameter(layer.B.detach())
        theirs.lora_magnitude_vector["default"].weight = nn.Parameter(layer.magnitude.detach())
    path = Path(path)
    with replacing(path, _FILES.__contains__) as folder:
        # Embeddings are frozen, but where tokens were added; "auto" would ask the hub for the base's vocabulary.
        model.save_pretrained(folder, save_embedding_layers=bool(embedding_names(pruner.model, "auto")))
        if (path / "README.md").exists():
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's template must not replace the user's text


def _refuse_pruned(pruner: Pruner) -> None:
    pruned = []
    for name, kept in pruner.plan().layers.items():
        rows, cols = kept.out_features - kept.rows.numel(), kept.in_features - kept.cols.numel()
        if rows or cols:
            pruned.append(f"{rows} rows and {cols} columns of {name!r}")
    if pruned:
        raise ValueError(
            f"to_peft: the masks must keep everything (got pruned: {pruned[0]}, {len(pruned)} layers in all); PEFT "
            "cannot hold pruned channels: use prunekern.compact"
        )
    if pruner.shrunk:
        raise ValueError("to_peft: the model must not be shrunk (its layers were rebuilt); use prunekern.compact")


def _refuse_split(pruner: Pruner) -> None:
    for name in families.fused_linears(pruner.model):
        parts = [layer for layer in pruner.layers if layer.startswith(name + ".")]
        if parts:
            raise ValueError(
                f"to_peft: the adapted layer {parts[0]!r} must be a linear of transformers' model (it is a part of the "
                f"fused {name!r}, and has an adapter of its own); use prunekern.compact, or leave it out of targets"
            )


def _refuse_zero_rows(pruner: Pruner) -> None:
    for name, layer in pruner.layers.items():
        layer.refresh()
        zero = (layer.inv_norm == 0).nonzero().flatten()
        if zero.numel():
            raise ValueError(
                f"to_peft: rows of V + s B A must not be all zero (got row {int(zero[0])} of {name!r}); PEFT divides "
                "by their norm, which gives NaN"
            )


def _head_modules(pruner: Pruner) -> list[str]:
    """Names of the fewest modules that hold the task head, frozen parameters among it only where one owns both."""
    model = pruner.model
    adapted = {id(p) for layer in pruner.layers.values() for p in layer.parameters()}
    head = {id(p) for p in task_head(model)}
    chosen = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in head:
            if parameter.requires_grad and id(parameter) not in adapted:
                raise ValueError(
                    f"to_peft: only adapters, masks and task head may be trained (got {name!r}); freeze it if it is as "
                    "it was"
                )
            continue
        owner = name.rpartition(".")[0]
        if not owner:
            raise ValueError(f"to_peft: {name!r} must belong to a module of the task head; PEFT saves whole modules")
        above = owner.rpartition(".")[0]
        while above and all(id(p) in head for p in model.get_submodule(above).parameters()):
            owner, above = above, above.rpartition(".")[0]
        chosen.add(owner)
    return sorted(n for n in chosen if not any(n.startswith(m + ".") for m in chosen))


def _dense(pruner: Pruner) -> nn.Module:
    """The dense model with the storage of the masked one: modules are new, parameters frozen views."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), False) for p in pruner.model.parameters()}
    for layer in pruner.layers.values():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = memo[id(layer.weight)]
        if layer.bias is not None:
            linear.bias = memo[id(layer.bias)]
        memo[id(layer)] = linear
    dense: nn.Module = copy.deepcopy(pruner.model, memo)
    return dense


def _lora_config(peft: Any, pruner: Pruner, modules_to_save: list[str]) -> Any:
    config, name = pruner.config, type(pruner.model).__name__
    # alpha of a layer is scale * rank whatever PEFT's rule was: rsLoRA's too.
    ranks = {n: layer.rank for n, layer in pruner.layers.items() if layer.rank != config.rank}
    alphas = {n: layer.scale * layer.rank for n, layer in pruner.layers.items()}
    return peft.LoraConfig(
        task_type=next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None),
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(pruner.layers),
        rank_pattern=ranks,
        alpha_pattern={n: a for n, a in alphas.items() if not math.isclose(a, config.alpha)},
        use_dora=True,
        modules_to_save=modules_to_save or None,
    )
