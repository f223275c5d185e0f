"""BASE and ADAPTER folders for `compact_files`."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.pruning.compact_files import compact_files
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.on_disk import content
from tests.helpers.tiny_models import attached, prune

Q = "distilbert.transformer.layer.0.attention.q_lin"


def build(family, task, dtype=torch.float32, **options):
    module = tiny_models if family in tiny_models.FAMILIES else tiny_decoders
    model = module.build(family, task, dtype=dtype, **options)
    model.config.dtype = dtype  # as from_pretrained leaves it
    return model


def batch(model):
    return (tiny_models if model.config.model_type in tiny_models.FAMILIES else tiny_decoders).batch(3)


def trained(model, share=0.4, **options):
    """An attached model after training, its head included."""
    pruner = prune(attached(model, **options), share)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and not name.endswith((".A", ".B", ".magnitude", ".logits")):
                p.add_(0.3)
    return pruner


def on_disk(folder, model, shards="5GB", **options):
    """BASE and ADAPTER of a dense model, and the trained one."""
    model.save_pretrained(folder / "base", max_shard_size=shards)
    pruner = trained(model, **options)
    pk.save_adapter(pruner, folder / "adapter")
    return pruner


def run(folder, **options):
    return compact_files(folder / "base", folder / "adapter", folder / "out", **options)


def tensors(folder):
    return {n: t for file in sorted(Path(folder).glob("*.safetensors")) for n, t in load_file(file).items()}


def names_of(folder):
    return set(content(folder))


# -- names of a base -------------------------------------------------------------------------------------------


def rename(folder, change, drop=()):
    file = folder / "base" / "model.safetensors"
    save_file({change(n): t for n, t in load_file(file).items() if not n.startswith(tuple(drop))}, file)
