"""What compact DeBERTa keeps between calls, and that it never decides what is computed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import prunekern as pk
from tests.helpers.equal_models import F32
from tests.helpers.tiny_deberta import batch, build, compact, names, watch_ragged
from tests.helpers.tiny_models import HIDDEN, LAYERS, attached, difference, logits, prune


@pytest.fixture
def ragged(monkeypatch):
    return watch_ragged(monkeypatch)


def written(small):
    with torch.no_grad():
        small.deberta.encoder.rel_embeddings.weight[:, ::3] += 1.0  # not what a LayerNorm takes out


def rows_written_past_the_counter(small):
    small.deberta.encoder.rel_embeddings.weight.data[3:9, ::3] += 2.0


def embeddings_replaced(small):
    weight = small.deberta.encoder.rel_embeddings.weight
    small.deberta.encoder.rel_embeddings.weight = nn.Parameter(weight.detach().roll(3, 1), requires_grad=False)


def embeddings_module_replaced(small):
    new = nn.Embedding(16, HIDDEN).requires_grad_(False)
    small.deberta.encoder.rel_embeddings = new


def norm_written(small):
    with torch.no_grad():
        small.deberta.encoder.LayerNorm.bias.add_(0.7)


def norm_written_by_numpy(small):
    small.deberta.encoder.LayerNorm.weight.detach().numpy()[5] += 2.0


def eps_changed(small):
    small.deberta.encoder.LayerNorm.eps = 0.5


def norm_hooked(small):
    small.deberta.encoder.LayerNorm.register_forward_hook(lambda m, a, y: y + 1.0)


def query_written(small):
    with torch.no_grad():
        small.get_submodule(names(0)["q"]).weight.mul_(1.5)


def key_bias_written(small):
    small.get_submodule(names(1)["k"]).bias.data.add_(0.5)


def state_loaded(small):
    small.load_state_dict({n: t.roll(3, 1) if "rel_embeddings" in n else t for n, t in small.state_dict().items()})


CHANGES = (
    written, rows_written_past_the_counter, embeddings_replaced, embeddings_module_replaced, norm_written,
    norm_written_by_numpy, eps_changed, norm_hooked, query_written, key_bias_written, state_loaded,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_two_calls_are_seen(change):
    small, inputs = compact(), batch()
    before = logits(small, inputs)
    assert torch.equal(logits(small, inputs), before)
    change(small)
    got = logits(small, inputs)
    fresh = copy.deepcopy(small)  # knows nothing of the calls before
    want = logits(fresh.double(), inputs)
    assert difference(before, want) > 1e-3 and difference(got, want) <= F32


def test_lengths_one_after_the_other(ragged):
    model = build()
    prune(attached(model), 0.4)
    small = pk.compact(model)
    for length in (5, 19, 5, 1, 30):
        inputs = batch(3, length, padded=length > 2)
        assert difference(logits(small, inputs), logits(model, inputs)) <= F32
    assert len(ragged) == 5 * LAYERS


def test_what_blocks_are_given_is_not_trusted_after_a_write():
    """A hook that changes mask or positions on their way to a block."""
    model = build()
    prune(attached(model), 0.4)
    small, inputs = pk.compact(model), batch(padded=False)
    before = logits(small, inputs)

    def change(module, args, kwargs):
        args[1][..., -2:] = 0  # the mask, in place
        kwargs["relative_pos"].clamp_(-2, 2)

    for m in (model, small):
        m.deberta.encoder.layer[0].register_forward_pre_hook(change, with_kwargs=True)
    for _ in range(2):
        got = logits(small, inputs)
        assert difference(got, logits(model, inputs)) <= F32 and difference(got, before) > 1e-3


def test_under_inference_mode_and_after():
    small, inputs = compact(), batch()
    with torch.inference_mode():
        want = small(**inputs).logits.clone()
    assert torch.equal(logits(small, inputs), want)
    small.classifier.weight.requires_grad_(True)
    small.deberta.encoder.layer[0].output.LayerNorm.weight.requires_grad_(True)
    out = small(**inputs).logits
    out.sum().backward()  # nothing that was kept is saved for a backward pass where it must not be
    assert difference(out.detach(), want) <= F32


def test_copies_and_pickles_have_their_own():
    small, inputs = compact(), batch()
    want = logits(small, inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(logits(other, inputs), want)
        given = {id(m.given) for m in other.modules() if hasattr(m, "given")}
        assert len(given) == 1 and id(small.deberta.encoder.given) not in given
        written(other)
        assert not torch.equal(logits(other, inputs), want)
    assert torch.equal(logits(small, inputs), want)


def test_functional_calls_are_of_the_parameters_they_are_given():
    small, inputs = compact(), batch()
    want, name = logits(small, inputs), "deberta.encoder.rel_embeddings.weight"
    changed = small.get_parameter(name).detach().roll(3, 1)
    with torch.no_grad():
        got = torch.func.functional_call(small, {name: changed}, (), inputs).logits
    assert torch.equal(logits(small, inputs), want) and difference(got, want) > 1e-3
    embeddings_replaced(small)
    assert torch.equal(logits(small, inputs), got)


def test_threads_with_lengths_of_their_own():
    small = compact()
    inputs = [batch(2, length) for length in (4, 9, 14)]
    want = [logits(small, one) for one in inputs]
    with ThreadPoolExecutor(3) as pool:
        again = list(pool.map(lambda one: logits(small, one), inputs * 8))
    assert all(difference(got, one) <= F32 for got, one in zip(again, want * 8, strict=True))
