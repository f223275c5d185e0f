"""CompactAttention: the three projections packed as one, and never out of date."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from prunekern import _native
from prunekern.nn import CompactAttention, CompactLinear
from prunekern.ops.compact_attention import compact_attention_reference

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
HIDDEN, QK, V = 40, (0, 7, 7, 12), (0, 3, 12, 13)  # three heads
MASK = torch.arange(9) < torch.tensor([[9], [4]])


class Block(torch.nn.Module):
    """As a model holds them: the projections are its children, each scattering into padded heads for other readers."""

    def __init__(self, seed=0, bias=(True, True, True), kinds=("fp32",) * 3):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, n, b, kind in zip("qkv", (QK[-1], QK[-1], V[-1]), bias, kinds, strict=True):
            weight, vector = torch.randn(n, HIDDEN, generator=g) / 6, torch.randn(n, generator=g)
            index = torch.arange(n) + 2
            layer = CompactLinear(weight, vector if b else None, None, index, n + 4, weights=kind)
            self.add_module(name, layer)
        self.attention = CompactAttention(QK, V, 0.4)

    def forward(self, x, mask=None):
        return self.attention(x, (self.q, self.k, self.v), mask)


def expected(block, x, mask=None, dtype=torch.float64):
    """Three products written out, then the reference."""
    parts = []
    for layer in (block.q, block.k, block.v):
        y = x.to(dtype) @ layer.plain_weight().detach().to(dtype).T
        parts.append(y if layer.bias is None else y + layer.bias.detach().to(dtype))
    return compact_attention_reference(*parts, QK, V, mask, 0.4)


def assert_fused(block, yes=True):
    assert (block.attention._packed is not None) is yes
    for layer in (block.q, block.k, block.v):
        assert (layer._packed is None) is yes


@pytest.fixture
def x():
    return torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(1))


@native
@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (False, True, False)])
def test_one_product_for_all_three(x, bias):
    block = Block(bias=bias)
    for mask in (None, MASK):
        torch.testing.assert_close(block(x, mask).double(), expected(block, x, mask), rtol=1e-5, atol=1e-5)
    assert_fused(block)
    parts = block.attention.project(x, (block.q, block.k, block.v))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1  # parts of one product


@native
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_other_kinds_of_weights(x, kind):
    block = Block(kinds=(kind,) * 3)
    # bf16 tiles round x as well: 2^-8 of products of about 1.
    torch.testing.assert_close(block(x, MASK).double(), expected(block, x, MASK), rtol=0.05, atol=0.05)
    assert_fused(block)
    assert block.attention._packed.weight.dtype == block.q.weight.dtype


@native
def test_kinds_that_do_not_go_together_are_run_one_by_one(x):
    block = Block(kinds=("fp32", "fp32", "int8"))
    torch.testing.assert_close(block(x, MASK).double(), expected(block, x, MASK), rtol=0.05, atol=0.05)
    assert_fused(block, False)


@native
def test_every_change_of_a_weight_or_bias_is_seen(x):
    block = Block()

    def check():
        torch.testing.assert_close(block(x).double(), expected(block, x), rtol=1e-5, atol=1e-5)

    check()
    with torch.no_grad():
        for name in "qkv":
            for parameter in ("weight", "bias"):
                getattr(getattr(block, name), parameter).mul_(1.5)
                check()
        block.k.weight = torch.nn.Parameter(block.k.weight * 2, requires_grad=False)
        check()
        block.v.bias.data = block.v.bias * 3
        check()
    block.q = Block(seed=5).q
    check()
    block.load_state_dict(Block(seed=6).state_dict())
    check()
    block.q.set_weights("int8"), block.k.set_weights("int8"), block.v.set_weights("int8")
    torch.testing.assert_close(block(x).double(), expected(block, x), rtol=0.05, atol=0.05)
    assert_fused(block)


@native
def test_weights_made_in_inference_mode_are_packed_again_after_load_state_dict(x):
    with torch.inference_mode():
        block = Block()
        block(x)
        block.load_state_dict(Block(seed=6).state_dict())
        torch.testing.assert_close(block(x).double(), expected(block, x), rtol=1e-5, atol=1e-5)


@native
def test_the_packed_weight_does_not_outlive_its_use(x):
    block = Block()
    block(x)
    packed = weakref.ref(block.attention._packed.weight)
    block.double()
    gc.collect()
    assert packed() is None
    torch.testing.assert_close(block(x.double(), MASK), expected(block, x, MASK), rtol=1e-12, atol=1e-12)
    block.float()
    torch.testing.assert_close(block(x).double(), expected(block, x), rtol=1e-5, atol=1e-5)
    assert_fused(block)


@native
def test_copies_and_pickles_pack_their_own(x):
    block = Block()
    want = block(x)
    assert set(block.state_dict()) == {f"{n}.{p}" for n in "qkv" for p in ("weight", "bias")}
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.attention._packed is None and twin.attention._layers is None
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.q.weight.zero_()
        assert not torch.equal(twin(x), want)
        assert torch.equal(block(x), want)


def test_gradients_go_through_the_plain_weights(x):
    block = Block().double().requires_grad_()
    x = x.double().requires_grad_()
    block(x, MASK).square().sum().backward()
    got = {n: p.grad for n, p in block.named_parameters()} | {"x": x.grad}
    twin = copy.deepcopy(block)
    twin.zero_grad(), setattr(x, "grad", None)
    parts = [torch.nn.functional.linear(x, m.weight, m.bias) for m in (twin.q, twin.k, twin.v)]
    compact_attention_reference(*parts, QK, V, MASK, 0.4).square().sum().backward()
    for name, p in (*twin.named_parameters(), ("x", x)):
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)
    assert_fused(block, True) if block.attention._packed else None


@native
def test_compiles_into_one_graph(x):
    block = Block()
    for prepared in (False, True):
        if prepared:
            for layer in (block.q, block.k, block.v):
                layer.pack()
        torch.compiler.reset()
        with torch.no_grad():
            got = torch.compile(block, fullgraph=True, backend="aot_eager")(x, MASK)
        torch.testing.assert_close(got.double(), expected(block, x, MASK), rtol=1e-5, atol=1e-5)


def test_no_channels_at_all(x):
    layers = [CompactLinear(torch.zeros(0, HIDDEN), torch.zeros(0)) for _ in range(3)]
    assert CompactAttention((0, 0), (0, 0), 1.0)(x, tuple(layers)).shape == (2, 9, 0)
    layers[2] = CompactLinear(torch.randn(5, HIDDEN))
    y = CompactAttention((0, 0), (0, 5), 1.0)(x, tuple(layers), MASK)
    values = x @ layers[2].weight.T
    mean = (values * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    torch.testing.assert_close(y, mean[:, None].expand_as(y), rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_make_the_heads_channels_are_refused():
    attention = CompactAttention((0, 4), (0, 4), 1.0)
    q, wide, x = CompactLinear(torch.randn(4, 8)), CompactLinear(torch.randn(7, 8)), torch.randn(2, 3, 8)
    with pytest.raises(TypeError, match=r"CompactAttention: k must be CompactLinear \(got Linear\)"):
        attention(x, (q, torch.nn.Linear(8, 4), q))
    with pytest.raises(ValueError, match=r"CompactAttention: v must make 4 channels \(got 7\)"):
        attention(x, (q, q, wide))
