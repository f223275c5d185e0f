"""Block by block: what blocks read is what the model gave them, with the weights that earlier ones have by then."""

import copy

import pytest
import torch

import prunekern as pk
from prunekern.compacting.compensated import compensated_layers
from prunekern.compacting.listening import Listener, run
from prunekern.compacting.walking import Walk
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import attached, batch, prune


class Seen(Listener):
    def __init__(self, name, module):
        super().__init__(name, module, 10**6)
        self.x = []

    def see(self, x):
        self.x.append(x.clone())


def decoder(family="llama"):
    model = tiny_decoders.build(family)
    prune(attached(model), 0.3)
    return pk.compact(model)


MODELS = {
    "encoder": (small_model, batch),
    **{f: (lambda f=f: decoder(f), tiny_decoders.batch) for f in tiny_decoders.FAMILIES},
}


def listeners(model, walk):
    parts = ("q", "o", "up", "down")
    return [Seen(n, model.get_submodule(n)) for b in walk.blocks for n in (getattr(b.names, p) for p in parts)]


@pytest.mark.parametrize("what", MODELS)
def test_layers_read_what_they_read_in_the_model(what):
    """Up to the order of sums: a block that nobody listens to is one call. K < 100 terms of 6e-8, twice, is 1e-5."""
    make, inputs_of = MODELS[what]
    model, inputs = make(), [inputs_of(seed=i) for i in range(3)]
    walk = Walk(model, iter(inputs), 10**6)
    want, got = listeners(model, walk), listeners(model, walk)
    run(model, inputs, want)
    for block in walk.blocks:
        walk.look(block, got[:4] if block is walk.blocks[0] else got[4:8])
        walk.pass_on(block)
    assert len(walk.used) == 3
    for one, other in zip(want[:8], got[:8], strict=True):
        assert len(one.x) == 3
        for a, b in zip(one.x, other.x, strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), one.name


@pytest.mark.parametrize("what", MODELS)
def test_later_blocks_read_what_rounded_ones_make_and_the_model_stays(what):
    make, inputs_of = MODELS[what]
    model, inputs = make(), [inputs_of(seed=i) for i in range(3)]
    before = copy.deepcopy(model.state_dict())
    found, used = compensated_layers(model, iter(inputs), 10**6)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and len(used) == 3
    assert set(found) == set(pk.plan(model).layers)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_error_leaves_the_weights_as_they_were(monkeypatch):
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Walk, "pass_on", lambda self, block: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compensated_layers(model, [tiny_decoders.batch()], 100)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
