"""The 16-bit copy of the frozen weight that training under CPU autocast keeps: V as it is now, and never beside it."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunekern.nn import MaskedDoRALinear
from tests.helpers.masked_dora import K, trained

op = importlib.import_module("prunekern.ops.dora_linear")  # the name in prunekern.ops is the function

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch):
    """What is multiplied has 16 bits all the same; the products could kill the process on some CPUs."""
    monkeypatch.setattr(op, "multiplies_bf16", lambda: False)


def step(layer, x, dtype=torch.bfloat16):
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def without_copy(layer, x):
    twin = copy.deepcopy(layer)
    twin._frozen = lambda: twin.weight
    return step(twin, x)


def same(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_made_once_and_the_answer_is_that_of_a_cast(norm_grad):
    layer, x = trained(masked=True, norm_grad=norm_grad).train(), torch.randn(5, K)
    same(step(layer, x), without_copy(layer, x))
    kept = layer._narrow
    assert kept.dtype == torch.bfloat16
    same(step(layer, x), without_copy(layer, x))
    assert layer._narrow is kept
    with torch.no_grad():  # an optimiser's step
        layer.B.mul_(2)
    same(step(layer, x), without_copy(layer, x))
    assert layer._narrow is kept
    assert step(layer, x, torch.float16)[0].dtype == torch.float16 and layer._narrow.dtype == torch.float16


def written(layer):
    with torch.no_grad():
        layer.weight.add_(0.25)


def written_through_data(layer):
    layer.weight.data.mul_(2)


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 3, requires_grad=False)


def loaded(layer):
    layer.load_state_dict({k: 2 * v if k == "weight" else v for k, v in layer.state_dict().items()})


def assigned(layer):
    state = {k: 2 * v if k == "weight" else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.weight.requires_grad_(False)


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("change", [written, written_through_data, replaced, loaded, assigned])
@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_it_follows_the_weight(change, norm_grad, refresh):
    layer, x = trained(norm_grad=norm_grad).train(), torch.randn(5, K)
    before = step(layer, x)
    change(layer)
    if refresh:  # as Pruner.step does: the norm is up to date, and says nothing of the copy
        layer.refresh()
    after = step(layer, x)
    same(after, without_copy(layer, x))
    assert not torch.equal(after[0], before[0]) or change is not written


def test_none_is_kept_where_nobody_trains():
    layer, x = trained().train(), torch.randn(5, K)
    for other in ("eval", "no_grad", "fp32", "needs grad"):
        step(layer, x)
        assert layer._narrow is not None
        with torch.autocast("cpu", torch.bfloat16, enabled=other != "fp32"), torch.set_grad_enabled(other != "no_grad"):
            if other == "needs grad":
                layer.weight.requires_grad_(True)
            layer.train(other != "eval")(x)
            layer.train().weight.requires_grad_(False)
        assert layer._narrow is None, other
    step(layer, x)
    twin = copy.deepcopy(layer)
    assert twin._narrow is None and layer._narrow is not None
    layer.double()
    assert layer._narrow is None


def test_trained_weights_are_still_refused():
    layer, x = trained().train(), torch.randn(5, K)
    step(layer, x)
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="V must be frozen"):
        step(layer, x)


def test_16_bit_weights_are_their_own_copy():
    layer = MaskedDoRALinear(torch.randn(9, K).bfloat16(), rank=2).train()
    step(layer, torch.randn(5, K))
    assert layer._narrow is None


def test_under_a_mode_that_looks_on():
    layer, x = trained().train(), torch.randn(5, K)
    plain = step(layer, x)
    with FlopCounterMode(display=False):
        same(step(layer, x), plain)
    same(step(layer, x), plain)


def test_checkpointed_again():
    layer, x = trained(masked=True).train(), torch.randn(5, K)
    plain = step(layer, x)
    for reentrant in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = x.clone().requires_grad_(reentrant)
            y = torch.utils.checkpoint.checkpoint(layer, own, use_reentrant=reentrant)
        y.float().square().sum().backward()
        same([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)], plain)
