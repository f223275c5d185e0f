"""What others put on the layers of a masked model: hooks, parametrisations, torch's own pruning, PEFT.

Lines of docs/guides/other-libraries.md. The reference is the definition: `tiny_models.reference`, or other parameters.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import prunekern as pk
from prunekern.nn import MaskedDoRALinear
from tests.habits.test_hooks import Doubled
from tests.habits.test_other_libraries import close, model_of

FAMILIES = ("distilbert", "bert", "llama")


def masked_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedDoRALinear)}


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_masked_layers(family):
    model, inputs = model_of("masked", family)
    model(**inputs)[0].sum().backward()
    want = {name: layer.B.grad.clone() for name, layer in masked_layers(model).items()}
    model.zero_grad()
    seen = {kind: {} for kind in ("forward", "pre", "backward")}
    for name, layer in masked_layers(model).items():
        layer.register_forward_hook(lambda m, a, y, n=name: seen["forward"].update({n: y.detach()}))
        layer.register_forward_pre_hook(lambda m, a, n=name: seen["pre"].update({n: a[0].detach()}))
        layer.register_full_backward_hook(lambda m, gi, go, n=name: seen["backward"].update({n: go[0]}))
    model(**inputs)[0].sum().backward()
    for name, layer in masked_layers(model).items():
        with torch.no_grad():
            weight, bias = layer.merged()
            on = layer.mask_values() if layer.mask is not None else torch.ones(len(weight))
            close(seen["forward"][name], nn.functional.linear(seen["pre"][name], on[:, None] * weight, on * bias))
        torch.testing.assert_close(layer.B.grad, want[name])
        assert seen["backward"][name].shape == seen["forward"][name].shape


@pytest.mark.parametrize("part", ["weight", "A", "B", "magnitude", "bias"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_parametrisations_of_masked_layers(family, part):
    """Of the model, and of the compact one that is made of it."""
    model, inputs = model_of("masked", family)
    name, layer = next(iter(masked_layers(model).items()))
    expected = copy.deepcopy(model)
    getattr(expected.get_submodule(name), part).mul_(2)
    want, before = expected(**inputs)[0], model(**inputs)[0]
    assert (want - before).abs().max() > 1e-4
    parametrize.register_parametrization(layer, part, Doubled())
    close(model(**inputs)[0], want)
    close(pk.compact(model)(**inputs)[0], want)
    parametrize.remove_parametrizations(layer, part)
    close(model(**inputs)[0], want)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pruning_masks_of_torch_on_masked_layers(family):
    model, inputs = model_of("masked", family)
    name, layer = next(iter(masked_layers(model).items()))
    expected = copy.deepcopy(model)
    model(**inputs)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    expected.get_submodule(name).weight.copy_(layer.weight)
    want = expected(**inputs)[0]
    close(model(**inputs)[0], want)
    close(pk.compact(model)(**inputs)[0], want)
    prune.remove(layer, "weight")
    close(model(**inputs)[0], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_on_masked_layers_is_refused_by_peft(family):
    peft = pytest.importorskip("peft")
    model, _ = model_of("masked", family)
    names = list(masked_layers(model))
    for cls in (peft.LoraConfig, peft.LoHaConfig, peft.HRAConfig):
        with pytest.raises((ValueError, TypeError), match="MaskedDoRALinear"):
            peft.get_peft_model(copy.deepcopy(model), cls(target_modules=names[:1]))
