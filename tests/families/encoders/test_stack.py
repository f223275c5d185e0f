"""All blocks of an encoder as one call: the numbers of the blocks one by one, for as long as they are what they were.
An encoder that is told to leaves padding out: every other token gets what it got, and padding is zero.
"""

import copy

import pytest
import torch

import prunekern as pk
from prunekern import _native
from prunekern.families.encoders import stack as encoder_stack
from prunekern.families.encoders import step as encoder_step
from prunekern.families.encoders.bert_like import rest_pooler
from prunekern.families.encoders.stack import skip_padding
from tests.helpers.tiny_models import HIDDEN, attached, batch, build, difference, prune

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")


def compacted(family, share=0.3, **options):
    model = build(family, "base", **options)
    prune(attached(model), share)
    return pk.compact(model)


def calls(monkeypatch):
    """(rows, blocks) of every call of the core."""
    rows, real = [], encoder_step._RUN

    def run(x, *args):
        y = real(x, *args)
        if y is not None:
            rows.append((x.shape[0] * x.shape[1], len(args[-1])))
        return y

    monkeypatch.setattr(encoder_step, "_RUN", run)
    return rows


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_tokens_are_what_they_were(family, side, monkeypatch):
    small, inputs = compacted(family), batch(5, 11)
    if side == "left":
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    if side == "holes":
        inputs["attention_mask"][0, 3] = 0
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = small(**inputs).last_hidden_state
        skip_padding(small)
        rows = calls(monkeypatch)
        got = small(**inputs).last_hidden_state
    assert rows == [(int(shown.sum()), 2)]
    assert difference(got[shown], want[shown]) < 1e-5 and not got[~shown].any()
    assert got.shape == (5, 11, HIDDEN)


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_in_few_bits(weights):
    from prunekern.compacting.checkpoint import set_weights

    small, inputs = set_weights(compacted("bert"), weights), batch(5, 11)
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = small(**inputs).last_hidden_state[shown]
        skip_padding(small)
        got = small(**inputs).last_hidden_state[shown]
    # A row's numbers may be rounded to another step where products of more rows sum in another order.
    assert difference(got, want) < 0.05 and float((got - want).abs().mean() / want.abs().mean()) < 0.005


@pytest.mark.parametrize("what", ["hidden states", "gradients", "no padding", "a hook", "a mask of queries", "float64"])
def test_what_takes_all_tokens(what, monkeypatch):
    small, inputs = compacted("bert"), batch(4, 9, padded=what != "no padding")
    options = {"output_hidden_states": True} if what == "hidden states" else {}
    if what == "a mask of queries":  # a mask of its own for every query
        mask = inputs["attention_mask"][:, None, None, :].bool().repeat(1, 1, 9, 1)
        mask[:, :, 0, 1] = False
        inputs["attention_mask"] = mask
    if what == "float64":
        small = small.double()
    with torch.no_grad():
        want = small(**inputs, **options)
    skip_padding(small)
    rows, seen = calls(monkeypatch), []
    if what == "a hook":
        small.encoder.layer[0].register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    if what == "gradients":
        small.requires_grad_(True)
        got = small(**inputs, **options)
        got.last_hidden_state.sum().backward()
        assert small.encoder.layer[0].output.dense.weight.grad is not None
    else:
        with torch.no_grad():
            got = small(**inputs, **options)
    assert difference(got.last_hidden_state, want.last_hidden_state) < 1e-5
    assert all(count == (36, 1 if what == "a hook" else 2) for count in rows)
    assert not seen or seen == [(4, 9, HIDDEN)]
    if what == "hidden states":
        assert len(got.hidden_states) == 3


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
@pytest.mark.parametrize("most", [1, 8, 9, 30])
def test_groups_of_sequences(most, monkeypatch):
    """Longer batches run group by group, a sequence never cut; each gets what it got."""
    small, inputs = compacted("bert"), batch(7, 11)
    shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = small(**inputs).last_hidden_state
        skip_padding(small)
        monkeypatch.setattr(encoder_stack, "_ROWS", most)
        monkeypatch.setattr(encoder_step, "_MOST_ROWS", 40)  # all rows, padding and all, are more
        rows = calls(monkeypatch)
        got = small(**inputs).last_hidden_state
    lengths = shown.sum(1).tolist()
    assert sum(count for count, _ in rows) == sum(lengths) and len(rows) > 1
    assert all(count <= max(most, max(lengths)) for count, _ in rows)
    assert difference(got[shown], want[shown]) < 1e-5 and not got[~shown].any()


@pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_for_all_blocks(family, monkeypatch):
    small, inputs = compacted(family), batch(4, 9)
    with torch.no_grad():
        rows = calls(monkeypatch)
        want = small(**inputs).last_hidden_state
        assert rows == [(36, 2)]
        small.train()
        small.eval()
        assert torch.equal(small(**inputs).last_hidden_state, want) and rows == [(36, 2)] * 2
        twin = copy.deepcopy(small)
        assert torch.equal(twin(**inputs).last_hidden_state, want) and len(rows) == 3
        # Blocks that trade places, or are there twice, are seen.
        layers = next(m for m in small.modules() if hasattr(m, "skips_padding")).layer
        first, second = layers
        layers[0], layers[1] = second, first
        swapped = small(**inputs).last_hidden_state
        assert difference(swapped, want) > 1e-3
        del layers[0]
        assert len(layers) == 1 and difference(small(**inputs).last_hidden_state, swapped) > 1e-3


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_blocks_that_are_added_or_of_a_subclass(family):
    small, inputs = compacted(family), batch(4, 9)
    layers = next(m for m in small.modules() if hasattr(m, "skips_padding")).layer
    with torch.no_grad():
        want = small(**inputs).last_hidden_state
        layers.append(copy.deepcopy(layers[0]))
        assert difference(small(**inputs).last_hidden_state, want) > 1e-3
        del layers[2]
        assert torch.equal(small(**inputs).last_hidden_state, want)

        class Plus(type(layers[1])):
            def forward(self, *args, **kwargs):
                return super().forward(*args, **kwargs) + 1

        layers[1].__class__ = Plus
        assert difference(small(**inputs).last_hidden_state, want + 1) < 1e-5


def test_a_block_that_is_replaced_is_called():
    small, inputs = compacted("bert"), batch(4, 9)
    seen = []

    class Mine(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *args, **kwargs):
            seen.append(x.shape)
            return self.inner(x, *args, **kwargs) + 1

    with torch.no_grad():
        want = small(**inputs).last_hidden_state
        small.encoder.layer[1] = Mine(small.encoder.layer[1])
        got = small(**inputs).last_hidden_state
    assert seen == [(4, 9, HIDDEN)] and difference(got, want + 1) < 1e-5


def test_a_sentence_without_any_token():
    small, inputs = compacted("bert"), batch(3, 9)
    inputs["attention_mask"][1] = 0
    skip_padding(small)
    with torch.no_grad():
        got = small(**inputs).last_hidden_state
    assert torch.isfinite(got).all()


def test_models_of_others_compute_padding():
    """Whoever reads hidden states himself finds there what the masked model gives."""
    model = build("bert", "base")
    prune(attached(model), 0.3)
    small, inputs = pk.compact(model), batch(4, 9)
    assert small.encoder.skips_padding is False
    with torch.no_grad():
        assert difference(small(**inputs).last_hidden_state, model(**inputs).last_hidden_state) < 1e-4


def test_train_and_eval_set_every_module():
    small = compacted("bert").eval()
    assert small.encoder.eval() is small.encoder and not any(m.training for m in small.modules())
    small.encoder.layer[1].attention.output.dropout.train()
    small.eval()
    assert not any(m.training for m in small.modules())
    small.train()
    assert all(m.training for m in small.modules())


def test_who_trains():
    """Set anywhere, in a module that came later, and of modules that keep their mode elsewhere: the long way."""
    for ask in {encoder_stack.any_trains, encoder_stack._any_trains}:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Dropout())).eval()
        assert ask(model) is False
        model[1].append(torch.nn.Dropout())
        assert ask(model) is True
        model.eval().register_module("none", None)
        assert ask(model) is False
        model.train()
        assert ask(model) is True
    if _native.available():
        core = _native.core().any_trains
        assert core(object()) is True and core(torch.jit.script(torch.nn.Linear(2, 2)).eval()) is True
        with pytest.raises(TypeError, match=r"takes 1 argument \(got 2\)"):
            core(model, model)


def test_a_pooler_that_nobody_reads():
    small, inputs = compacted("bert"), batch(2, 5)
    with torch.no_grad():
        want = small(**inputs)
        rest_pooler(small)
        got = small(**inputs)
        assert got.pooler_output is None and torch.equal(got.last_hidden_state, want.last_hidden_state)
        seen = []
        handle = small.pooler.register_forward_hook(lambda module, args, y: seen.append(y))
        torch.testing.assert_close(small(**inputs).pooler_output, want.pooler_output)
        assert torch.equal(seen[0], want.pooler_output)
        handle.remove()
        rest_pooler(small, False)
        torch.testing.assert_close(small(**inputs).pooler_output, want.pooler_output)
    rest_pooler(compacted("electra"))  # has none
