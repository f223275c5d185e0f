"""MPNet: a bias by relative position meets the logits, of the heads that are left, in one call and by parts."""

import pickle

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern.compacting import checkpoint
from prunekern.families.encoders import step as encoder_step
from tests.helpers.encoder_edges import EDGES
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_models import (
    HIDDEN,
    LAYERS,
    attached,
    batch,
    build,
    difference,
    keep_only,
    logits,
    names,
    prune,
    watch,
)


def compacted(family, task="token", share=0.4, **options):
    model = build(family, task, **options)
    prune(attached(model), share, seed=1)
    return model, pk.compact(model)


@pytest.mark.parametrize("edge", EDGES)
def test_mpnet_edge(edge):
    n = names("mpnet", 1)
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build("mpnet", "token", dtype=dtype)
        keep_only(attached(model), {n[part]: kept for part, kept in EDGES[edge].items()})
        check(model, batch(3), tolerance)


PARTS = ["compact_linear"] * 4 + ["compact_mlp"]


@pytest.mark.parametrize("kind", ("fp32", "bf16", "int8", "int4"))
def test_mpnet_runs_as_one_call_and_by_parts(kind, monkeypatch):
    """With the same answers, also for few heads, of which each keeps its own bias."""
    for share in (0.0, 0.6):
        _, small = compacted("mpnet", share=share)
        checkpoint.set_weights(small, kind)
        for padded in (False, True):
            inputs = batch(padded=padded)
            calls = watch(monkeypatch)
            whole = logits(small, inputs)
            assert calls == ["encoder_block"] * LAYERS
            with torch.inference_mode():
                assert torch.equal(small(**inputs).logits, whole)
            assert calls == ["encoder_block"] * 2 * LAYERS
            monkeypatch.setattr(encoder_step, "_RUN", None)
            calls.clear()
            by_parts = logits(small, inputs)
            assert "encoder_block" not in calls and (kind != "fp32" or calls == PARTS * LAYERS)
            assert difference(whole, by_parts) <= (F32 if kind == "fp32" else 0.05)
            monkeypatch.undo()


def test_mpnet_masks_written_to_on_the_way():
    """A hook before the second block forbids one key more: what the encoder found in the mask no longer holds."""
    model, small = compacted("mpnet")

    def forbid(module, args):
        args[1][:, :, :, 1] = torch.finfo(torch.float32).min

    answers = []
    for one in (model, small):
        handle = one.mpnet.encoder.layer[1].register_forward_pre_hook(forbid)
        answers.append(logits(one, batch()))
        handle.remove()
    assert difference(answers[1], answers[0]) <= F32
    assert difference(logits(small, batch()), answers[1]) > 1e-3


def test_mpnet_copies_and_changes_are_seen():
    _, small = compacted("mpnet")
    inputs = batch()
    before = logits(small, inputs)
    other = pickle.loads(pickle.dumps(small))
    with torch.no_grad():
        other.mpnet.encoder.layer[0].attention.attn.o.weight.mul_(2)
        other.mpnet.encoder.relative_attention_bias.weight.mul_(2)
    after = logits(other, inputs)
    assert difference(after, before) > 1e-3 and torch.equal(logits(small, inputs), before)
    other.mpnet.encoder.layer[0].attention.attn.scaling *= 2
    assert difference(logits(other, inputs), after) > 1e-3


def test_mpnet_reads_its_bias():
    """It is no constant of the tests: without it the answers are others, and it alone tells two orders apart."""
    model, small = compacted("mpnet", dtype=torch.float64)
    before = logits(small, batch())
    with torch.no_grad():
        for one in (model, small):
            one.mpnet.encoder.relative_attention_bias.weight.mul_(2)
    assert difference(logits(small, batch()), before) > 1e-3
    check(model, batch(), F64, small)


@pytest.mark.parametrize("share", (0.4, 1.0))
def test_mpnet_attention_weights(share):
    """Of the heads that are left, in order; answers as without them."""
    model, small = compacted("mpnet", share=share, dtype=torch.float64)
    inputs = batch()
    with torch.no_grad():
        got, want = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (small, model))
        short = small(**inputs, output_attentions=True, return_dict=False)
    assert difference(got.logits, want.logits) <= F64 and difference(got.logits, logits(small, inputs)) <= F64
    assert torch.equal(short[0], got.logits)
    plan = pk.plan(small)
    for layer, (a, b) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        kept = torch.unique(plan.layers[names("mpnet", layer)["v"]].rows // (HIDDEN // b.shape[1]))
        assert difference(a, b[:, kept]) <= F64 if len(kept) else a.shape == (4, 0, 9, 9)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert difference(a, b) <= F64


def test_mpnet_sequence_of_padding_only():
    """As in transformers: it reads all of its padding alike."""
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model, small = compacted("mpnet", dtype=dtype)
        inputs = batch(3, padded=False)
        inputs["attention_mask"][1] = 0
        check(model, inputs, tolerance, small)


def test_mpnet_masks_of_ones_own():
    model, small = compacted("mpnet")
    inputs = batch(padded=False)
    allowed = torch.ones(9, 9).tril().log().clamp(min=torch.finfo(torch.float32).min)
    for mask in (allowed.expand(4, 1, 9, 9), allowed[None, None]):
        own = {**inputs, "attention_mask": mask}
        assert difference(logits(small, own), logits(model, own)) <= F32
        assert difference(logits(small, own), logits(small, inputs)) > 1e-3


def test_mpnet_learns_compact_and_shrunk():
    """Gradients through the compact blocks are those of the masked model; shrunk it computes the same."""
    model, small = compacted("mpnet", dtype=torch.float64)
    inputs = batch()
    norms = [m.get_submodule("mpnet.embeddings.LayerNorm").weight for m in (model, small)]
    grads = []
    for one, norm in zip((model, small), norms, strict=True):
        norm.requires_grad_(True)
        one(**inputs).logits.square().sum().backward()
        grads.append(norm.grad)
    assert difference(grads[1], grads[0]) <= F64
    drops = [m for m in small.modules() if isinstance(m, nn.Dropout)]
    for dropout in drops:
        dropout.p = 0.5
    with torch.no_grad():
        assert not torch.equal(small.train()(**inputs).logits, small(**inputs).logits)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


@pytest.mark.parametrize("part", ("", ".attention", ".attention.attn", ".attention.attn.o", ".attention.LayerNorm",
                                  ".attention.attn.v", ".intermediate", ".output", ".output.dense"))  # fmt: skip
def test_mpnet_modules_are_heard_and_can_be_replaced(part):
    _, small = compacted("mpnet")
    inputs, name = batch(), f"mpnet.encoder.layer.0{part}"
    want, heard = logits(small, inputs), []
    handle = small.get_submodule(name).register_forward_hook(lambda *args: heard.append(1))
    assert difference(logits(small, inputs), want) <= F32 and heard == [1]
    handle.remove()
    parent, _, child = name.rpartition(".")
    before = small.get_submodule(name)
    setattr(small.get_submodule(parent), child, Doubled(before))
    assert difference(logits(small, inputs), want) > 1e-3
    setattr(small.get_submodule(parent), child, before)
    assert torch.equal(logits(small, inputs), want)
