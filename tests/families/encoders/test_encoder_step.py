"""An encoder block in one call gives, bit for bit, what the calls of its parts give, whatever happens in between."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import prunekern as pk
from prunekern.compacting import checkpoint
from prunekern.families.encoders import step as encoder_step
from prunekern.nn import CompactLinear
from tests.helpers.equal_models import F32
from tests.helpers.tiny_models import FAMILIES, LAYERS, attached, batch, build, difference, logits, prune, watch

WHOLE = ["encoder_block"] * LAYERS


def compact(family="bert", kind="fp32", share=0.4):
    model = build(family)
    prune(attached(model), share, seed=1)
    small = pk.compact(model)
    checkpoint.set_weights(small, kind)
    return small


def by_parts(model, inputs):
    run, encoder_step._RUN = encoder_step._RUN, None
    try:
        return logits(model, inputs)
    finally:
        encoder_step._RUN = run


def attention_of(model) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "ragged"))


def norm_of(model) -> nn.LayerNorm:
    """One inside a block: the embeddings have the first."""
    return [m for m in model.modules() if isinstance(m, nn.LayerNorm)][1]


def linear_of(model) -> CompactLinear:
    """The output projection of the last block's MLP."""
    return [m for m in model.modules() if isinstance(m, CompactLinear)][-1]


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("kind", ("fp32", "bf16", "int8", "int4"))
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_equals_its_parts(family, kind, padded, monkeypatch):
    small, inputs = compact(family, kind), batch(padded=padded)
    want = by_parts(small, inputs)
    calls = watch(monkeypatch)
    assert torch.equal(logits(small, inputs), want)
    assert calls == WHOLE


def test_many_rows_run_by_parts(monkeypatch):
    """Else the core would keep memory for them for good."""
    small, inputs = compact(), batch(padded=False)
    want = logits(small, inputs)
    rows = inputs["input_ids"].numel()
    calls = watch(monkeypatch)
    monkeypatch.setattr(encoder_step, "_MOST_ROWS", rows - 1)
    assert torch.equal(logits(small, inputs), want) and "encoder_block" not in calls
    calls.clear()
    monkeypatch.setattr(encoder_step, "_MOST_ROWS", rows)
    assert torch.equal(logits(small, inputs), want) and calls == WHOLE


@pytest.mark.parametrize("share", (0.0, 0.97, 1.0))
def test_little_or_nothing_left(share):
    small, inputs = compact(share=share), batch()
    assert torch.equal(logits(small, inputs), by_parts(small, inputs))


def written(small):
    with torch.no_grad():
        linear_of(small).weight.mul_(2)


def data_assigned(small):
    linear_of(small).weight.data = linear_of(small).weight.data * 2


def bias_written_past_the_counter(small):
    linear_of(small).bias.data.add_(1)


def norm_written(small):
    with torch.no_grad():
        norm_of(small).weight.mul_(2)


def norm_replaced(small):
    norm_of(small).weight = nn.Parameter(norm_of(small).weight.detach() * 2, requires_grad=False)


def norm_bias_replaced(small):
    norm_of(small).bias = nn.Parameter(norm_of(small).bias.detach() + 1, requires_grad=False)


def eps_changed(small):
    norm_of(small).eps = 0.5


def scaling_changed(small):
    attention_of(small).scaling *= 2


def activation_renamed(small):
    act = next(m for m in small.modules() if type(m).__name__ == "Activation")
    act.name = "relu"


def state_loaded(small):
    small.load_state_dict({name: t * 1.5 for name, t in small.state_dict().items()})


def loaded_in_place(small):
    small.load_state_dict({n: t * 1.5 for n, t in small.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    (
        written,
        data_assigned,
        bias_written_past_the_counter,
        norm_written,
        norm_replaced,
        norm_bias_replaced,
        eps_changed,
        scaling_changed,
        activation_renamed,
        state_loaded,
        loaded_in_place,
    ),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_changes_between_two_calls_are_seen(family, change, monkeypatch):
    small, inputs = compact(family), batch()
    before = logits(small, inputs)
    change(small)
    want = by_parts(small, inputs)
    assert not torch.equal(before, want)
    calls = watch(monkeypatch)
    assert torch.equal(logits(small, inputs), want)
    assert calls == WHOLE


def hooked(module):
    def hook(*args):
        module.heard += 1

    module.heard = 0
    return module.register_forward_hook(hook)


@pytest.mark.parametrize("which", (attention_of, norm_of, linear_of))
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_are_heard(family, which, monkeypatch):
    small, inputs = compact(family), batch()
    want = logits(small, inputs)
    module = which(small)
    handle = hooked(module)
    calls = watch(monkeypatch)
    assert difference(logits(small, inputs), want) <= F32  # a layer that is heard is no part of a fused MLP
    assert module.heard == 1 and calls.count("encoder_block") == LAYERS - 1
    handle.remove()
    calls.clear()
    assert torch.equal(logits(small, inputs), want) and module.heard == 1 and calls == WHOLE


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **kwargs):
        return 2 * self.inner(x, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_put_in_the_place_of_ours_are_called(family, monkeypatch):
    small, inputs = compact(family), batch()
    before = logits(small, inputs)
    norm = norm_of(small)
    parent, name = next(
        (module, name) for module in small.modules() for name, child in module.named_children() if child is norm
    )
    setattr(parent, name, Doubled(norm))
    calls = watch(monkeypatch)
    after = logits(small, inputs)
    assert not torch.equal(after, before) and calls.count("encoder_block") == LAYERS - 1
    setattr(parent, name, norm)
    assert torch.equal(logits(small, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_not_ordinary_runs_by_parts(family, monkeypatch):
    small, inputs = compact(family), batch()
    want = logits(small, inputs)
    calls = watch(monkeypatch)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]):  # a profiler wants a row for every op
        small(**inputs)
    linear_of(small).weight.requires_grad_()
    assert small(**inputs).logits.requires_grad
    assert calls.count("encoder_block") == LAYERS - 1
    linear_of(small).weight.requires_grad_(False)
    calls.clear()
    small.double()
    assert difference(logits(small, inputs).float(), want) <= F32
    assert "encoder_block" not in calls
    assert torch.equal(logits(small.float(), inputs), want) and calls == WHOLE


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_not_passed_over(family, monkeypatch):
    small, inputs = compact(family), batch()
    for module in small.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    want = logits(small, inputs)
    small.train()
    calls = watch(monkeypatch)
    with torch.no_grad():
        assert not torch.equal(small(**inputs).logits, want)
    assert "encoder_block" not in calls
    calls.clear()
    assert torch.equal(logits(small.eval(), inputs), want) and calls == WHOLE


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_have_their_own(family):
    small, inputs = compact(family), batch()
    want = logits(small, inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        written(other)
        assert not torch.equal(logits(other, inputs), want)
        assert torch.equal(logits(other, inputs), by_parts(other, inputs))
    assert torch.equal(logits(small, inputs), want)
