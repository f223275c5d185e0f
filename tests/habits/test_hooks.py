"""Hooks on modules of masked and compact models fire as on the dense model, and see what they would see there.

The reference is transformers' own dense model, from which nothing was removed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

import prunekern as pk
from prunekern.nn import CompactAttention, CompactLinear, CompactMLP
from tests.helpers import tiny_decoders, tiny_models

FFN = {
    "distilbert": "distilbert.transformer.layer.0.ffn",
    "bert": "bert.encoder.layer.0.output",
    "llama": "model.layers.0.mlp",
}
FAMILIES = ("distilbert", "bert", "roberta", "llama", "qwen2", "mistral", "qwen3")


def compact(family, share=0.3):
    tiny = tiny_models if family in tiny_models.FAMILIES else tiny_decoders
    model = tiny.build(family)
    tiny_models.prune(tiny_models.attached(model), share)
    return pk.compact(model).eval(), tiny.batch()


def whole(family):
    """Of a model from which nothing was removed: dense and compact modules see the same tensors."""
    tiny = tiny_models if family in tiny_models.FAMILIES else tiny_decoders
    dense = tiny.build(family).eval()
    masked = copy.deepcopy(dense)
    pk.attach(masked, pk.PruneConfig(rank=4, sparsity=0.1))
    return dense, pk.compact(masked.eval()).eval(), tiny.batch()


def leaves(model):
    return {name: m for name, m in model.named_modules() if name}


def observed(model, names, inputs, kind):
    """What hooks of a kind are given, by module name."""
    seen, handles, modules = {}, [], leaves(model)

    def note(name, value):
        value = next(iter(value), None) if isinstance(value, tuple) else value
        if isinstance(value, torch.Tensor):
            seen.setdefault(name, value.detach().clone())

    for name in names:
        module = modules[name]
        if kind == "forward":
            handles.append(module.register_forward_hook(lambda m, a, y, name=name: note(name, y)))
        elif kind == "forward_pre":
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: note(name, a)))
        elif kind == "full_backward":
            handles.append(module.register_full_backward_hook(lambda m, gi, go, name=name: note(name, go)))
        else:
            handles.append(module.register_full_backward_pre_hook(lambda m, go, name=name: note(name, go)))
    loss = model(**inputs)[0].square().sum()
    if "backward" in kind:
        loss.backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_see_what_they_see_in_the_dense_model(family, kind):
    dense, small, inputs = whole(family)
    # Rotary tables are no tensors with a gradient; all else is hooked, one module at a time and all at once.
    for model in (dense, small):
        model.requires_grad_(True)
    shared = [name for name in leaves(dense) if name in leaves(small)]
    want = observed(dense, shared, inputs, kind)
    assert len(want) > 15
    alone = {name: value for name in want for value in [observed(small, [name], inputs, kind).get(name)]}
    together = observed(small, shared, inputs, kind)
    for name, value in want.items():
        for got in (alone[name], together.get(name)):
            assert got is not None, f"{name} was not called"
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_all_modules(family):
    """`register_module_forward_hook` and its relatives: what profilers of modules set."""
    small, inputs = compact(family)
    names = {m: n for n, m in small.named_modules()}
    with torch.no_grad():
        want = small(**inputs)[0]
        called = set()
        handle = module_hooks.register_module_forward_hook(lambda m, a, y: called.add(names.get(m)))
        try:
            torch.testing.assert_close(small(**inputs)[0], want, rtol=1e-4, atol=1e-4)
        finally:
            handle.remove()
        assert torch.equal(small(**inputs)[0], want)
    linears = {n for n, m in small.named_modules() if isinstance(m, CompactLinear)}
    assert linears and linears <= called


@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
def test_gradients_can_be_changed_by_hooks(family):
    small, inputs = compact(family)
    small.requires_grad_(True)
    name, layer = next(
        (n, m) for n, m in small.named_modules() if n.endswith(("lin1", "intermediate.dense", "gate_proj"))
    )
    small(**inputs)[0].sum().backward()
    before = layer.weight.grad.clone()
    small.zero_grad()
    handle = layer.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else 2 * g for g in gi))
    small(**inputs)[0].sum().backward()
    handle.remove()
    torch.testing.assert_close(layer.weight.grad, before, rtol=1e-4, atol=1e-6)  # its own is formed of go
    earlier = next(p for n, p in small.named_parameters() if "embed" in n and p.grad is not None)
    assert earlier.grad.abs().sum() > 0, name


@torch.no_grad()
def test_a_hook_may_change_the_output():
    for family in FFN:
        small, inputs = compact(family)
        want = small(**inputs)[0]
        block = small.get_submodule(FFN[family])
        handle = block.register_forward_hook(lambda m, a, y: 0 * y)
        assert not torch.allclose(small(**inputs)[0], want, atol=1e-3)
        handle.remove()
        assert torch.equal(small(**inputs)[0], want)


@torch.no_grad()
def test_hooks_are_seen_while_a_model_generates():
    small, inputs = compact("llama")
    ids = inputs["input_ids"][:1, :4]
    want = small.generate(ids, max_new_tokens=6, do_sample=False)
    for name in ("mlp.act_fn", "mlp.up_proj", "self_attn", "self_attn.o_proj", "input_layernorm"):
        calls = []
        module = small.get_submodule(f"model.layers.1.{name}")
        handle = module.register_forward_hook(lambda m, a, y, calls=calls: calls.append(1))
        assert torch.equal(small.generate(ids, max_new_tokens=6, do_sample=False), want)
        handle.remove()
        assert len(calls) == 6, name


def test_hooks_of_layers_without_a_model():
    x = torch.randn(3, 8)
    up, down = CompactLinear(torch.randn(12, 8)), CompactLinear(torch.randn(8, 12))
    mlp = CompactMLP(up, down)
    want, calls = mlp(x), []
    for layer in (mlp.up, mlp.down):
        layer.register_full_backward_hook(lambda *_: calls.append(1))
    x.requires_grad_()
    y = mlp(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert len(calls) == 2
    q, k, v = (CompactLinear(torch.randn(4, 8), None, None, [0, 1, 4, 5], 8) for _ in range(3))
    attention, seen = CompactAttention((0, 2, 4), (0, 2, 4), 0.5), []
    z = torch.randn(1, 3, 8)
    want = attention(z, (q, k, v))
    q.register_forward_hook(lambda m, a, y: seen.append(tuple(y.shape)))
    torch.testing.assert_close(attention(z, (q, k, v)), want, rtol=1e-5, atol=1e-5)
    assert seen == [(1, 3, 8)]


# --- other hands ------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@torch.no_grad()
def test_parametrisations(family):
    """torch.nn.utils.parametrize makes a property of the weight, and another class of the layer."""
    for name, leaf in [(n, m) for n, m in compact(family)[0].named_modules() if isinstance(m, CompactLinear)][:8]:
        small, inputs = compact(family)
        expected = copy.deepcopy(small)
        expected.get_submodule(name).weight.mul_(2)
        layer = small.get_submodule(name)
        small(**inputs)
        nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        torch.testing.assert_close(small(**inputs)[0], expected(**inputs)[0], rtol=1e-4, atol=1e-4)
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(small(**inputs)[0], expected(**inputs)[0], rtol=1e-4, atol=1e-4)
        assert leaf.weight.shape == layer.weight.shape


@torch.no_grad()
def test_pruning_masks_and_weight_norm_of_torch():
    from torch.nn.utils import prune, weight_norm

    small, inputs = compact("distilbert")
    layer = small.distilbert.transformer.layer[0].ffn.lin1
    small(**inputs)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert int((layer.weight == 0).sum()) >= layer.weight.numel() // 2
    other, _ = compact("distilbert")
    other.distilbert.transformer.layer[0].ffn.lin1.weight.copy_(layer.weight)
    torch.testing.assert_close(small(**inputs)[0], other(**inputs)[0], rtol=1e-4, atol=1e-4)
    prune.remove(layer, "weight")
    torch.testing.assert_close(small(**inputs)[0], other(**inputs)[0], rtol=1e-4, atol=1e-4)
    normed = CompactLinear(torch.randn(5, 4))
    x = torch.randn(2, 4)
    want = normed(x)
    weight_norm(normed, "weight")
    torch.testing.assert_close(normed(x), want, rtol=1e-5, atol=1e-5)
    normed.weight_g.mul_(3)
    torch.testing.assert_close(normed(x), 3 * want, rtol=1e-5, atol=1e-5)
