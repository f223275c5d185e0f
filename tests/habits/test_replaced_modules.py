"""Modules that others put in the place of ours: they are called as the dense model would call them.

Wrappers that answer for what they wrap (as PEFT's do), subclasses, other activations. The reference is transformers'
own dense model with the same replacement, or the model with other weights that it stands for.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern.nn import CompactLinear, CompactMLP
from tests.habits.test_hooks import compact, whole
from tests.helpers import tiny_decoders


class Twice(nn.Module):
    """Twice what a module gives; asked for anything else, it answers for that module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


class Silent(nn.Module):
    """The same, but it knows nothing of what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class DoubleLinear(CompactLinear):
    def forward(self, x, residual=None):
        y = 2 * super().forward(x)
        return y if residual is None else residual + y


def in_its_place(module):
    module.__class__ = DoubleLinear
    return module


PLACES = {
    "distilbert": ("attention", "attention.out_lin", "attention.v_lin", "ffn", "ffn.lin1", "ffn.lin2", "ffn.dropout",
                   "ffn.activation", "sa_layer_norm"),
    "bert": ("attention", "attention.self", "attention.self.query", "attention.output", "attention.output.dense",
             "intermediate", "intermediate.dense", "intermediate.intermediate_act_fn", "output", "output.dense",
             "output.dropout"),
    "llama": ("self_attn", "self_attn.k_proj", "self_attn.o_proj", "mlp", "mlp.gate_proj", "mlp.down_proj",
              "mlp.act_fn", "input_layernorm"),
}  # fmt: skip
BLOCK = {"distilbert": "distilbert.transformer.layer.0", "bert": "bert.encoder.layer.0", "llama": "model.layers.0"}


def replaced(model, name, make):
    model = copy.deepcopy(model)
    model.set_submodule(name, make(model.get_submodule(name)))
    return model


def answers(model, inputs):
    """Logits, and what a decoder generates."""
    generated = None
    if model.config.model_type in tiny_decoders.FAMILIES:
        ids = inputs["input_ids"][:1, :4]
        generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    return model(**inputs)[0], generated


def assert_alike(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-4)
    assert want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("family", PLACES)
@torch.no_grad()
def test_a_wrapper_is_called_as_in_the_dense_model(family):
    dense, small, inputs = whole(family)
    for place in PLACES[family]:
        name = f"{BLOCK[family]}.{place}"
        assert_alike(answers(replaced(small, name, Twice), inputs), answers(replaced(dense, name, Twice), inputs))
        if "act" in place:  # another one altogether
            other = [answers(replaced(model, name, lambda _: nn.Tanh()), inputs) for model in (small, dense)]
            assert_alike(*other)


@pytest.mark.parametrize("make", [Twice, Silent, in_its_place])
@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("grad", [False, True])
def test_every_linear_of_a_pruned_model_may_be_wrapped(grad, family, make):
    small, inputs = compact(family)
    small.requires_grad_(grad)
    small(**inputs)  # all is packed
    for name in [n for n, m in small.named_modules() if isinstance(m, CompactLinear) and n.startswith(BLOCK[family])]:
        want = copy.deepcopy(small)
        with torch.no_grad():
            for parameter in want.get_submodule(name).parameters():
                parameter.mul_(2)
        with torch.set_grad_enabled(grad):
            assert_alike(answers(replaced(small, name, make), inputs), answers(want, inputs))


@torch.no_grad()
def test_put_there_after_a_first_call():
    """What is remembered of a block, down to its one call while generating, does not outlive its modules."""
    small, inputs = compact("llama")
    answers(small, inputs)
    for place in PLACES["llama"]:
        name = f"{BLOCK['llama']}.{place}"
        want, inner = answers(replaced(small, name, Twice), inputs), small.get_submodule(name)
        small.set_submodule(name, Twice(inner))
        assert_alike(answers(small, inputs), want)
        small.set_submodule(name, inner)


@pytest.mark.parametrize("place", ["up", "down", "gate"])
@torch.no_grad()
def test_in_a_compact_mlp_by_itself(place):
    mlp, x = CompactMLP(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12), "silu"), torch.randn(3, 8)
    want = copy.deepcopy(mlp)
    for parameter in getattr(want, place).parameters():
        parameter.mul_(2)
    setattr(mlp, place, Twice(getattr(mlp, place)))
    torch.testing.assert_close(mlp(x, x), want(x, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dropout_taken_out_by_identity():
    """As many do to switch it off for good."""
    for family, name in (("distilbert", "ffn.dropout"), ("bert", "output.dropout")):
        small, inputs = compact(family)
        want = answers(small, inputs)
        assert_alike(answers(replaced(small, f"{BLOCK[family]}.{name}", lambda _: nn.Identity()), inputs), want)


@torch.no_grad()
def test_a_part_compiled_by_itself():
    small, inputs = compact("bert")
    want = answers(small, inputs)
    name = f"{BLOCK['bert']}.intermediate.dense"
    compiled = replaced(small, name, lambda m: torch.compile(m, backend="aot_eager"))
    assert_alike(answers(compiled, inputs), want)
    with pytest.raises(ValueError, match="plan: model must not have a wrapped part"):
        pk.plan(compiled)
