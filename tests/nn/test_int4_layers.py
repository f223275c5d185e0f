"""Layers that hold their weights in int4: memory, state dicts, copies, what is seen of changes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

from prunekern.nn import CompactAttention, CompactLinear, CompactMLP
from prunekern.nn.packed import Packed
from prunekern.ops import dequantize_weight_int4, quantize_weight_int4
from prunekern.ops.compact_linear import compact_linear_reference
from tests.helpers.compact_linears import kept, native


def layer(n=40, k=50, **options):
    torch.manual_seed(n + k)
    return CompactLinear(torch.randn(n, k), torch.randn(n), weights="int4", **options)


def expected(one, x, activations="float"):
    return compact_linear_reference(
        x, one.weight, one.bias, one.in_index, one.out_index, one.out_features, one.activation, None, one.scale,
        activations,
    )  # fmt: skip


def assert_right(one, x):
    """Whatever `auto` is here."""
    with torch.no_grad():
        got = one(x)
        off = min(float((got - expected(one, x, word)).abs().max()) for word in ("float", "int8"))
    # gelu of sums of 8-bit products is a short polynomial, within 5.2e-5.
    assert off <= 1e-5 * float(got.abs().max()) + (6e-5 if one.activation == "gelu" else 0.0)


def test_memory_is_as_small_as_the_bits_say():
    one = CompactLinear(torch.randn(96, 640), weights="int4")
    held = sum(t.numel() * t.element_size() for t in (*one.parameters(), *one.buffers()))
    assert held == 96 * 640 * 4.5 / 8
    assert (one.weights, one.weight.dtype, one.scale.dtype, one.kept_in) == ("int4", torch.uint8, torch.float16, 640)
    ragged = CompactLinear(torch.randn(96, 33), weights="int4")
    assert ragged.weight.shape == (96, 32) and ragged.scale.shape == (96, 2) and ragged.kept_in == 33


@native
def test_packed_memory():
    one = CompactLinear(torch.randn(96, 640), weights="int4").pack()
    assert one._packed.weight.numel() == 96 * 640 * 4.5 / 8 and one._packed.scale is None


@pytest.mark.parametrize("k", [1, 31, 33, 64, 372])
def test_calls(k):
    one = layer(k=k)
    for m in (1, 5, 30):
        assert_right(one, torch.randn(m, k))
    x = torch.randn(3, k)
    for word in ("float", "int8"):
        one.activations = word
        torch.testing.assert_close(one(x), expected(one, x, word), rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    picks = CompactLinear(torch.randn(9, k), None, kept(k, k + 3), kept(9, 12), 12, "gelu", "int4")
    assert_right(picks, torch.randn(4, k + 3))


def test_x_of_another_width_is_refused():
    """Between 33 and 64 inputs the codes have one shape."""
    one = layer(k=50)
    for width in (49, 51, 64):
        with pytest.raises(ValueError, match=re.escape(f"x must have 50 channels, the weight's inputs (got {width})")):
            one(torch.randn(2, width))


def test_state_dict_is_plain():
    one = layer()
    state = one.state_dict()
    assert list(state) == ["weight", "bias"] and state["weight"].shape == (40, 50)
    assert state["weight"].dtype == torch.float32 and torch.equal(state["weight"], one.plain_weight())
    assert torch.equal(one.plain_weight(), dequantize_weight_int4(one.weight, one.scale, 50))
    other = CompactLinear(torch.zeros(40, 50), torch.zeros(40), weights="int4")
    x = torch.randn(3, 50)
    other(x)
    fresh = {"weight": torch.randn(40, 50), "bias": torch.randn(40)}
    other.load_state_dict(fresh)
    codes, scale = quantize_weight_int4(fresh["weight"])
    assert torch.equal(other.weight, codes) and torch.equal(other.scale, scale)
    assert_right(other, x)
    other.load_state_dict(state)
    assert torch.equal(other.plain_weight(), one.plain_weight())  # rounded once


@pytest.mark.parametrize("shape", [(40, 32), (40, 49), (39, 50)])
def test_a_state_dict_of_another_shape(shape):
    """[40, 32] is the shape of the codes."""
    with pytest.raises(RuntimeError, match=re.escape(f"weight must have shape [40, 50] (got {list(shape)})")):
        layer().load_state_dict({"weight": torch.randn(shape), "bias": torch.randn(40)})
    with pytest.raises(RuntimeError, match="weight: .*must be finite"):
        layer().load_state_dict({"weight": torch.full((40, 50), float("nan")), "bias": torch.randn(40)})


def test_moves_and_copies():
    x, one = torch.randn(3, 50), layer()
    want = one(x)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), copy.deepcopy(one).bfloat16().float()):
        assert (twin.weights, twin.kept_in, twin.scale.dtype) == ("int4", 50, torch.float16)
        torch.testing.assert_close(twin(x), want, rtol=0, atol=0.02)
    double = copy.deepcopy(one).double()
    assert double.scale.dtype == torch.float16 and double(x.double()).dtype == torch.float64
    meta = CompactLinear(torch.empty(40, 50, device="meta"), weights="int4")
    assert meta.kept_in == 50 and meta.weight.is_meta and meta.scale.is_meta


def test_from_kind_to_kind():
    one = layer()
    rounded = one.plain_weight()
    assert "in=50" in repr(one) and "weights=int4" in repr(one)
    one.set_weights("int4", "int8")
    assert one.activations == "int8" and one.set_weights("int8").activations == "int8"
    assert one.weight.dtype == torch.int8 and one.scale.shape == (40,)
    one.set_weights("int4").set_weights("fp32")
    assert one.activations == "auto" and one.scale is None and one.kept_in == 50
    assert (one.weight - rounded).abs().max() < 0.1 * rounded.abs().max()
    with pytest.raises(ValueError, match="CompactLinear: weights must be one of fp32, bf16, int8, int4 .got 'int2'"):
        one.set_weights("int2")
    with pytest.raises(ValueError, match="hold them in int8 or int4"):
        one.set_weights("bf16", "int8")
    bad = CompactLinear(torch.full((3, 4), float("inf")))
    with pytest.raises(ValueError, match="weight must be finite"):
        bad.set_weights("int4")


@native
def test_changes_are_seen():
    one, x = layer(), torch.randn(3, 50)
    assert_right(one, x)
    with torch.no_grad():
        one.scale.mul_(2)
        assert_right(one, x)
        one.scale = one.scale * 2
        assert_right(one, x)
        one.weight.bitwise_xor_(0x11)
        assert_right(one, x)
        one.weight.data[3] = 0x97
        assert_right(one, x)


@native
def test_compiled_layers():
    one, x = layer(activations="int8").pack(), torch.randn(3, 50)
    up, down, gate = layer(48, 50), layer(30, 48), layer(48, 50)
    mlp = CompactMLP(up, down, gate, "silu")
    with torch.no_grad():
        want = mlp(x)
        for module, answer in ((one, one(x)), (mlp, want)):
            torch._dynamo.reset()
            compiled = torch.compile(module, fullgraph=True)
            assert torch.equal(compiled(x), answer)
        down.scale.mul_(2)
        down.weight.bitwise_xor_(0x11)  # the graph goes to the plain weights, which `auto` does not round
        words = [layer_.activations for layer_ in (up, down, gate)]
        for layer_ in (up, down, gate):
            layer_.activations = "float"
        right = mlp(x)
        for layer_, word in zip((up, down, gate), words, strict=True):
            layer_.activations = word
        assert (compiled(x) - right).norm() < 0.05 * right.norm() and (compiled(x) - want).norm() > 0.1 * want.norm()


@native
def test_layers_packed_together():
    layers = [layer(n, 50) for n in (40, 7, 33)]
    together = Packed(layers)
    x = torch.randn(5, 50)
    y = torch.ops.prunekern.compact_linear(
        x, together.weight, together.bias, None, None, 80, "none", None, together.scale, "float"
    )
    want = torch.cat([expected(one, x) for one in layers], -1)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert together.is_fresh()
    layers[1].scale = layers[1].scale * 2
    assert not together.is_fresh()
    with pytest.raises(ValueError, match="Packed: weights must share K"):
        Packed([layer(40, 50), layer(40, 51)])


@native
def test_attention_of_int4_layers():
    torch.manual_seed(0)
    attention, layers = CompactAttention((0, 8, 20), (0, 10, 16), 0.3), (layer(20, 50), layer(20, 50), layer(16, 50))
    x = torch.randn(2, 6, 50)
    for one in layers:
        one.activations = "float"
    with torch.no_grad():
        y = attention(x, layers)
        assert attention._packed is not None
        want = attention.attend(*(expected(one, x) for one in layers))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_x_gets_its_gradient():
    one, x = layer().double(), torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    one(x).sum().backward()
    torch.testing.assert_close(x.grad, one.plain_weight().double().sum(0).expand(3, 50))
