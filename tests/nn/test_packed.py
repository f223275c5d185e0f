"""Packed copies of a model's weights: where they lie, and that they still are what the layers hold."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from prunekern import _native
from prunekern.nn import CompactLinear
from prunekern.nn.packed import pack_all
from prunekern.ops.packing import _PAGE, pack_weight, side_by_side, unpack_weight

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))


def model(kind="fp32"):
    torch.manual_seed(0)
    sizes = ((70, 40), (33, 70), (600, 33), (5, 600))
    return nn.Sequential(*(CompactLinear(torch.randn(n, k), torch.randn(n), weights=kind) for n, k in sizes))


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_weights_of_a_model_share_huge_pages(kind):
    layers, x = model(kind), torch.randn(3, 40)
    with torch.inference_mode():
        want = layers(x)  # each packed by itself
    pack_all(layers)
    panels = [layer._packed.weight for layer in layers]
    assert len({p.untyped_storage().data_ptr() for p in panels}) == 1
    assert panels[0].data_ptr() % _PAGE == 0
    ends = [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in panels]
    assert all(0 <= begin - end < 64 and begin % 64 == 0 for (_, end), (begin, _) in zip(ends, ends[1:], strict=False))
    with torch.inference_mode():
        assert torch.equal(layers(x), want)


@native
def test_the_memory_stays_with_the_last_weight():
    layers = model()
    pack_all(layers)
    last, want = layers[3]._packed.weight, layers[3].weight.clone()
    del layers
    gc.collect()
    assert torch.equal(unpack_weight(last, 5), want)


@native
def test_more_than_a_chunk_and_nothing_at_all():
    weights = [torch.randn(3000, 1000) for _ in range(4)] + [torch.randn(0, 7), torch.randn(9000, 1000)]
    with side_by_side():
        packed = [pack_weight(w) for w in weights]
    alone = [pack_weight(w) for w in weights]
    assert all(torch.equal(a, b) for a, b in zip(packed, alone, strict=True))
    assert len({p.untyped_storage().data_ptr() for p in packed[:4]}) == 2
