"""Compact decoders, and what files in few bits hold of them and of others."""

import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.nn import CompactLinear
from tests.helpers import tiny_decoders
from tests.helpers.tiny_models import attached, prune


def decoder(tied, family="llama", share=0.5, **options):
    model = tiny_decoders.build(family, tie_word_embeddings=tied, **options)
    prune(attached(model), share)
    return pk.compact(model)


def held(model):
    """Kind, weight and scale of every compact layer, the head too."""
    return {
        name: (m.weights, m.weight.detach().clone(), m.scale)
        for name, m in model.named_modules()
        if isinstance(m, CompactLinear)
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, (kind, weight, scale) in one.items():
        assert kind == other[name][0] and weight.dtype == other[name][1].dtype, name
        assert torch.equal(weight, other[name][1]), name
        assert (scale is None) == (other[name][2] is None), name
        assert scale is None or (torch.equal(scale, other[name][2]) and scale.dtype == other[name][2].dtype), name


def tensors(folder):
    return load_file(folder / "model.safetensors")


def edit(folder, change):
    held = tensors(folder)
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
