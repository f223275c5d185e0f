"""An encoder that is told to leaves padding out: every other token gets what it got, and padding is zero."""

import pytest
import torch

import prunekern as pk
from prunekern import _native
from prunekern.families.encoders import step as encoder_step
from prunekern.families.encoders.padding import skip_padding
from tests.helpers.tiny_models import HIDDEN, attached, batch, build, difference, prune

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def compacted(family, share=0.3, **options):
    model = build(family, "base", **options)
    prune(attached(model), share)
    return pk.compact(model)


def calls(monkeypatch):
    """Rows of the blocks that ran as one call."""
    rows, real = [], encoder_step._RUN

    def run(x, *args):
        y = real(x, *args)
        if y is not None:
            rows.append(x.shape[0] * x.shape[1])
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
    assert rows == [int(shown.sum())] * 2
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
    assert all(count == 36 for count in rows)
    assert not seen or seen == [(4, 9, HIDDEN)]
    if what == "hidden states":
        assert len(got.hidden_states) == 3


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
