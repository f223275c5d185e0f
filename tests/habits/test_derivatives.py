"""Second derivatives, forward mode and torch.func: right, or refused. The reference is the definition in float64.

Meta-learning and influence functions ask for Hessian-vector products; per-sample gradients for vmap over grad.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

import prunekern as pk
from prunekern.nn import CompactLinear
from prunekern.nn.indexed import pick_channels, place_channels
from prunekern.ops import compact_attention, compact_linear, compact_mlp, dora_linear, rms_norm, rotate_pairs
from prunekern.ops.dora_linear import dora_linear_reference
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.masked_dora import K, trained

T, RANK = 5, 3


def random(*shape, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def dora_inputs():
    V = random(7, 6, grad=False)
    return [random(T, 6), V, random(RANK, 6), random(7, RANK), random(7), random(7, seed=1)]


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("trained_ones", [(0, 2, 3, 4, 5), (0,), (2,), (3,), (4,), (0, 4), (2, 3)])
def test_dora_linear(trained_ones, with_lora):
    inputs = [t.detach().requires_grad_(i in trained_ones) for i, t in enumerate(dora_inputs())]
    x_lora = random(T, 6, seed=2, grad=0 in trained_ones) if with_lora else None
    assert torch.autograd.gradgradcheck(lambda *a: dora_linear(*a[:6], 0.7, a[6]), (*inputs, x_lora))


def test_a_hessian_vector_product_is_that_of_the_definition():
    inputs = dora_inputs()
    wanted = [t for t in inputs if t.requires_grad]

    def product(f):
        loss = f(*inputs, 0.7).square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), wanted)

    for got, want in zip(product(dora_linear), product(dora_linear_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_of_a_masked_model_and_its_probe_stays_a_constant():
    layer = trained(torch.float64, masked=True).train()
    layer.mask.open(True)
    x = random(T, K)
    wanted = [layer.A, layer.B, layer.magnitude]

    def second(f):
        first = torch.autograd.grad(f(x).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    def definition(x):  # with the row norm a constant, as PEFT and DoRA have it
        W = layer.weight + layer.scale * layer.B @ layer.A
        gain = layer.magnitude / W.detach().norm(dim=1)
        return gain * (x @ W.T) + layer.bias

    for got, want in zip(second(layer), second(definition), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("through_the_op", [False, True])
def test_compact_linear(activation, through_the_op):
    x, weight, bias, residual = random(T, 8), random(5, 4), random(5), random(T, 9)
    rest = (torch.tensor([0, 2, 3, 7]), torch.tensor([0, 1, 4, 6, 8]), 9, activation)
    call = torch.ops.prunekern.compact_linear if through_the_op else compact_linear
    inputs = (x, weight, bias, residual)
    assert torch.autograd.gradgradcheck(lambda x, w, b, r: call(x, w, b, *rest, r, None), inputs)


def test_the_other_ops():
    x, heads = random(2, 4, 6), ((0, 2, 6), (0, 3, 5))
    q, k, v = x, random(2, 5, 6, seed=1), random(2, 5, 5, seed=2)
    assert torch.autograd.gradgradcheck(lambda q, k, v: compact_attention(q, k, v, *heads, None, 0.4), (q, k, v))
    causal = lambda q, k, v: compact_attention(q, k, v, *heads, None, 0.4, 1, True)  # noqa: E731
    assert torch.autograd.gradgradcheck(causal, (q, k, v))
    up, down, gate = random(7, 6), random(6, 7), random(7, 6, seed=3)
    assert torch.autograd.gradgradcheck(
        lambda x, u, d, g: compact_mlp(x, u, d, g, activation="silu"), (x, up, down, gate)
    )
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, random(6)))
    cos, sin = random(1, 4, 3, grad=False), random(1, 4, 3, grad=False, seed=1)
    angle = torch.tensor([0, 1, 2])
    assert torch.autograd.gradgradcheck(lambda x: rotate_pairs(x, cos, sin, angle, (0, 2, 6)), (x,))
    index = torch.tensor([0, 2, 5])
    assert torch.autograd.gradgradcheck(lambda x: pick_channels(x, index).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: place_channels(x, torch.arange(1, 12, 2), 13).square(), (x,))


def test_what_has_no_gradient_says_so():
    x, cos, sin = random(1, 4, 6), random(1, 4, 3), random(1, 4, 3, grad=False)
    with pytest.raises(RuntimeError, match="cos and sin must not require a gradient"):
        rotate_pairs(x, cos, sin, torch.tensor([0, 1, 2]), (0, 2, 6)).sum().backward()


@pytest.mark.parametrize(
    "op", ["compact_linear", "compact_mlp", "attention", "rms_norm", "rotary", "dora", "pick", "place"]
)
def test_forward_mode_is_the_derivative(op):
    cos, sin, angle = random(1, 4, 3, grad=False), random(1, 4, 3, grad=False, seed=1), torch.tensor([0, 1, 2])
    weight, index = random(5, 6, grad=False), torch.tensor([0, 2, 5])
    dora = [t.detach() for t in dora_inputs()]
    call = {
        "compact_linear": lambda x: compact_linear(x, weight, None, None, torch.arange(0, 10, 2), 10, "gelu"),
        "compact_mlp": lambda x: compact_mlp(x, weight, weight.T, activation="silu"),
        "attention": lambda x: compact_attention(x, x, x, (0, 2, 6), (0, 3, 6), None, 0.4),
        "rms_norm": lambda x: rms_norm(x, weight[0], 1e-5),
        "rotary": lambda x: rotate_pairs(x, cos, sin, angle, (0, 2, 6)),
        "dora": lambda x: dora_linear(x, *dora[1:], 0.7),
        "pick": lambda x: pick_channels(x, index).square(),
        "place": lambda x: place_channels(x, torch.arange(1, 12, 2), 13).square(),
    }[op]
    x, dx = random(2, 4, 6, grad=False), random(2, 4, 6, grad=False, seed=1)
    want = torch.autograd.functional.jvp(call, x, dx)[1]  # by two backward passes
    torch.testing.assert_close(jvp(call, (x,), (dx,))[1], want)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(x, dx))).tangent
    torch.testing.assert_close(tangent, want)


def per_sample(model, params, inputs, labels):
    """Gradients of every example by itself, both ways."""

    def loss(params, ids, label):
        out = functional_call(model, params, (), {"input_ids": ids[None]})
        return torch.nn.functional.cross_entropy(out.logits, label[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(params, inputs["input_ids"], labels)
    for i in range(len(labels)):
        for p in params.values():
            p.grad = None
        one = {"input_ids": inputs["input_ids"][i : i + 1]}  # transformers looks into masks, which vmap cannot
        torch.nn.functional.cross_entropy(model(**one).logits, labels[i : i + 1]).backward()
        yield {name: (together[name][i], p.grad) for name, p in params.items()}


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_per_sample_gradients(kind):
    model = tiny_models.build("distilbert")
    tiny_models.prune(tiny_models.attached(model), 0.3)
    model = (pk.compact(model) if kind == "compact" else model).eval()
    if kind == "compact":
        model.requires_grad_(True)
    model.set_attn_implementation("eager")
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and "logits" not in n}
    inputs, labels = tiny_models.batch(3, padded=False), torch.tensor([0, 1, 1])
    for found in per_sample(model, params, inputs, labels):
        for name, (got, want) in found.items():
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)


def test_ensembles_by_vmap_over_packed_layers():
    layers = [CompactLinear(torch.randn(9, 6), torch.randn(9), activation="gelu") for _ in range(3)]
    x = torch.randn(4, 6)
    want = torch.stack([layer(x) for layer in layers])  # packed
    params, buffers = torch.func.stack_module_state(layers)
    got = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(layers[0](x), want[0])


def test_a_hessian_through_a_compact_layer():
    layer = CompactLinear(torch.randn(3, 4, dtype=torch.float64), activation="gelu")
    x = torch.randn(4, dtype=torch.float64)
    weight = layer.weight.detach()
    want = hessian(lambda x: torch.nn.functional.gelu(weight @ x).sum())(x)
    torch.testing.assert_close(hessian(lambda x: layer(x).sum())(x), want)


def test_functional_call_uses_the_weights_it_is_given():
    model = tiny_decoders.build("llama")
    tiny_models.prune(tiny_models.attached(model), 0.3)
    small, inputs = pk.compact(model).eval(), tiny_decoders.batch()
    with torch.no_grad():
        before = small(**inputs).logits
        doubled = {n: 1.1 * p for n, p in small.named_parameters()}
        got = functional_call(small, doubled, (), inputs).logits
        assert torch.equal(small(**inputs).logits, before)
        for p in small.parameters():
            p.mul_(1.1)
        torch.testing.assert_close(got, small(**inputs).logits, rtol=1e-5, atol=1e-5)
