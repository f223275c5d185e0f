"""Packed copies of a model's weights: where they lie, and that they still are what the layers hold."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from prunekern import _native
from prunekern.nn import CompactAttention, CompactLinear, CompactMLP
from prunekern.nn.packed import pack_all
from prunekern.ops.packing import HUGE_PAGE, pack_weight, side_by_side, unpack_weight

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))


def model(kind="fp32"):
    torch.manual_seed(0)
    sizes = ((70, 40), (33, 70), (600, 33), (5, 600))
    return nn.Sequential(*(CompactLinear(torch.randn(n, k), torch.randn(n), weights=kind) for n, k in sizes))


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_weights_of_a_model_share_huge_pages(kind):
    layers, x = model(kind), torch.randn(3, 40)
    with torch.inference_mode():
        want = layers(x)  # each packed by itself
    pack_all(layers)
    panels = [layer._packed.weight for layer in layers]
    assert len({p.untyped_storage().data_ptr() for p in panels}) == 1
    assert panels[0].data_ptr() % HUGE_PAGE == 0
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


@native
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_steps_of_optimisers_are_noticed(optimizer, fused):
    """Fused ones leave PyTorch's version counters as they are."""
    layer, x = CompactLinear(torch.randn(24, 16), torch.randn(24)).requires_grad_(), torch.randn(3, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        layer.pack()(x), compiled(x)
    made = optimizer(layer.parameters(), lr=0.5, fused=fused)
    for _ in range(2):
        made.zero_grad()
        layer(x).square().sum().backward()
        made.step()
        want = nn.functional.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("what", ["linear", "mlp", "attention"])
def test_nothing_is_packed_under_a_tracer(what):
    """Its tensors have no memory: the core would write to address 0."""
    q, k, v = (CompactLinear(torch.randn(16, 16)) for _ in range(3))
    if what == "attention":
        module, rest = CompactAttention((0, 16), (0, 16), 0.25), ((q, k, v),)
    else:
        module, rest = (q if what == "linear" else CompactMLP(q, k)), ()
    x = torch.randn(2, 4, 16)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = module(x, *rest)
        assert fake.shape == x.shape and type(fake) is not torch.Tensor
        made_here = CompactLinear(torch.randn(8, 16))
        assert made_here(x).shape == (2, 4, 8) and made_here.pack()._packed is None
    with torch.no_grad():
        graph = make_fx(lambda x: module(x, *rest), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        torch.testing.assert_close(graph(x), module(x, *rest), rtol=1e-4, atol=1e-4)


@native
def test_tensors_without_memory_are_refused():
    layer, x = CompactLinear(torch.randn(24, 16)), torch.randn(3, 16)
    with torch.no_grad():
        layer(x)
        zeros = layer(torch.zeros(3, 16))
        try:
            assert torch.equal(layer(torch._efficientzerotensor(3, 16)), zeros)
        except ValueError as error:
            assert "has no memory" in str(error)
        x.untyped_storage().resize_(0)  # as FSDP does between uses
        with pytest.raises(ValueError, match=r"has no memory \(got \[3, 16\] Tensor\)"):
            layer(x)
        weight = torch.randn(24, 16)
        weight.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=r"pack_weight: weight has no memory \(got \[24, 16\] Tensor\)"):
            pack_weight(weight)
