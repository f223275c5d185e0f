"""A ModernBERT block in one call gives, bit for bit, what the calls of its parts give, whatever happens in between."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import prunekern as pk
from prunekern import _native
from prunekern.compacting import checkpoint
from prunekern.families.encoders import prenorm_step as step
from tests.helpers.equal_models import F32
from tests.helpers.tiny_models import attached, difference, prune
from tests.helpers.tiny_modernbert import HIDDEN, LAYERS, batch, build, names, results

pytestmark = pytest.mark.skipif(not _native.available(), reason="needs the C++ core")
N = names(1)


def compact(kind="fp32", share=0.4, **options):
    small = pk.compact(prune(attached(build(**options)), share, seed=1).model)
    return checkpoint.set_weights(small, kind)


def by_parts(model, inputs):
    run, step._RUN = step._RUN, None
    try:
        return results(model, inputs)
    finally:
        step._RUN = run


@pytest.fixture
def count(monkeypatch):
    """How many blocks were one call since the last look."""
    made, real = [], step._RUN

    def whole(*args):
        y = real(*args)
        made.extend([1] * (y is not None))
        return y

    def look():
        seen = len(made)
        made.clear()
        return seen

    monkeypatch.setattr(step, "_RUN", whole)
    return look


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("kind", ("fp32", "bf16", "int8", "int4"))
@pytest.mark.parametrize("plain", (False, True))
def test_one_call_equals_its_parts(plain, kind, padded, count):
    """Biases and none; the first block, which has no norm; lengths within the window and beyond it."""
    small = compact(kind, plain=plain)
    for length in (4, 13, 40):
        inputs = batch(3, length, padded)
        want = by_parts(small, inputs)
        count()
        assert torch.equal(results(small, inputs), want) and count() == LAYERS


@pytest.mark.parametrize("share", (0.0, 0.97, 1.0))
def test_little_or_nothing_left(share):
    small, inputs = compact(share=share), batch()
    assert torch.equal(results(small, inputs), by_parts(small, inputs))


def parameter(small, name):
    return small.get_parameter(f"{name}.weight" if not name.endswith("bias") else name)


CHANGES = {
    "written": lambda m: parameter(m, N["down"]).data.mul_(2),
    "gate written": lambda m: parameter(m, N["gate"]).data.mul_(-1),
    "query written": lambda m: parameter(m, N["k"]).data.mul_(2),
    "data assigned": lambda m: setattr(parameter(m, N["o"]), "data", parameter(m, N["o"]).data * 2),
    "bias written": lambda m: parameter(m, f"{N['q']}.bias").data.add_(1),
    "norm written": lambda m: parameter(m, "model.layers.1.attn_norm").data.mul_(2),
    "norm bias": lambda m: parameter(m, "model.layers.0.mlp_norm.bias").data.add_(1),
    "norm replaced": lambda m: setattr(
        m.model.layers[1].mlp_norm, "weight", nn.Parameter(torch.full((HIDDEN,), 2.0), requires_grad=False)
    ),
    "eps changed": lambda m: setattr(m.model.layers[1].attn_norm, "eps", 0.5),
    "width of heads changed": lambda m: setattr(m.model.layers[1].attn, "head_dim", 48),
    "activation renamed": lambda m: setattr(m.model.layers[0].mlp.act, "name", "relu"),
    "state loaded": lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({n: t * 1.5 for n, t in m.state_dict().items()}, assign=True),
    "a norm in the first block": lambda m: setattr(
        m.model.layers[0], "attn_norm", copy.deepcopy(m.model.layers[1].attn_norm)
    ),
    "window": lambda m: setattr(m.config, "local_attention", 14),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_calls_are_seen(change, count):
    small, inputs = compact(), batch()
    before = results(small, inputs)
    CHANGES[change](small)
    want = by_parts(small, inputs)
    assert not torch.equal(before, want)
    count()
    assert torch.equal(results(small, inputs), want) and count() == LAYERS


@pytest.mark.parametrize(
    "name", (*N.values(), "model.layers.1.attn", "model.layers.1.mlp_norm", "model.layers.1.mlp.Wi")
)
def test_hooks_are_heard(name, count):
    small, inputs, heard = compact(), batch(), []
    want = results(small, inputs)
    count()
    handle = small.get_submodule(name).register_forward_hook(lambda *args: heard.append(1))
    assert difference(results(small, inputs), want) <= F32 and count() == LAYERS - 1
    assert heard == [1] * (not name.endswith("Wi"))  # it holds others, which are called
    handle.remove()
    assert torch.equal(results(small, inputs), want) and count() == LAYERS


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


@pytest.mark.parametrize(
    "name", [*N.values(), *(f"model.layers.1.{m}" for m in ("attn", "mlp", "attn_norm", "mlp.act"))]
)
def test_modules_put_in_the_place_of_ours_are_called(name, count):
    small, inputs = compact(), batch()
    before, inner = results(small, inputs), small.get_submodule(name)
    parent, child = small.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    count()
    setattr(parent, child, Doubled(inner))
    assert not torch.equal(results(small, inputs), before) and count() == LAYERS - 1
    setattr(parent, child, inner)
    assert torch.equal(results(small, inputs), before) and count() == LAYERS


def test_what_is_not_ordinary_runs_by_parts(count):
    small, inputs = compact(), batch()
    want = results(small, inputs)
    assert count() == LAYERS
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]):  # a profiler wants a row for every op
        small(**inputs)
    assert count() == 0
    parameter(small, N["gate"]).requires_grad_()
    assert small(**inputs).logits.requires_grad and count() == LAYERS - 1
    parameter(small, N["gate"]).requires_grad_(False)
    small.double()
    assert difference(results(small, inputs).float(), want) <= F32 and count() == 0
    assert torch.equal(results(small.float(), inputs), want) and count() == LAYERS
    small.set_attn_implementation("eager")
    results(small, inputs)
    assert count() == 0


def test_dropout_is_not_passed_over(count):
    small, inputs = compact(mlp_dropout=0.5, attention_dropout=0.5), batch()
    want = results(small, inputs)
    assert count() == LAYERS
    small.train()
    assert not torch.equal(results(small, inputs), want) and count() == 0
    small.eval().model.layers[1].mlp.train()
    assert not torch.equal(results(small, inputs), want) and count() == LAYERS - 1
    assert torch.equal(results(small.eval(), inputs), want) and count() == LAYERS


def test_copies_and_pickles_have_their_own():
    small, inputs = compact(), batch()
    want = results(small, inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        CHANGES["written"](other)
        assert not torch.equal(results(other, inputs), want)
        assert torch.equal(results(other, inputs), by_parts(other, inputs))
    assert torch.equal(results(small, inputs), want)
