"""Encoders with BERT's block under other names, and every head of all of them: as the others, in fewer mixtures."""

import pickle

import pytest
import torch
import transformers
from torch import nn

import prunekern as pk
import prunekern.hf
from prunekern import families
from prunekern.compacting import checkpoint
from prunekern.compacting.latency import latency
from prunekern.families.encoders import step as encoder_step
from prunekern.pruning.attach import task_head
from tests.helpers.encoder_edges import EDGES
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_models import (
    CLASSES,
    FAMILIES,
    FFN,
    HIDDEN,
    LAYERS,
    PAD,
    RELATIVES,
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

KINDS = [(family, attention) for family in RELATIVES for attention in ("sdpa", "eager")]
KINDS.remove(("mpnet", "sdpa"))  # transformers has it as "eager" only


def compacted(family, task="token", share=0.4, **options):
    model = build(family, task, **options)
    prune(attached(model), share, seed=1)
    return model, pk.compact(model)


@pytest.mark.parametrize("share", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("family,attention", KINDS)
def test_compact_equals_masked(family, attention, share):
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model, small = compacted(family, share=share, attention=attention, dtype=dtype)
        for size, padded in ((1, False), (1, True), (8, True)):
            check(model, batch(size, padded=padded), tolerance, small)


@pytest.mark.parametrize("edge", EDGES)
def test_mpnet_edge(edge):
    n = names("mpnet", 1)
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build("mpnet", "token", dtype=dtype)
        keep_only(attached(model), {n[part]: kept for part, kept in EDGES[edge].items()})
        check(model, batch(3), tolerance)


# -- heads -----------------------------------------------------------------------------------------------------------

AUTO = {"base": "AutoModel", "masked_lm": "AutoModelForMaskedLM", "pretraining": "AutoModelForPreTraining"}
AUTO |= {"sequence": "AutoModelForSequenceClassification", "token": "AutoModelForTokenClassification"}
AUTO |= {"question": "AutoModelForQuestionAnswering", "choice": "AutoModelForMultipleChoice"}
AUTO |= {"next_sentence": "AutoModelForNextSentencePrediction"}
EVERY = [case for case in CLASSES if case[0] in RELATIVES or case[1] not in ("sequence", "token", "masked_lm")]


def inputs_of(task):
    inputs = batch(4)
    return {name: t.view(2, 2, -1) for name, t in inputs.items()} if task == "choice" else inputs


def loss_of(model, task, inputs):
    """What the head trains with; of a base model, a loss that reads its hidden states."""
    ids = inputs["input_ids"]
    first = torch.arange(len(ids))
    labels = {
        "base": {},
        "question": {"start_positions": first, "end_positions": first},
        "sequence": {"labels": first % 3},
        "choice": {"labels": first % 2},
        "next_sentence": {"labels": first % 2},
        "token": {"labels": ids % 3},
        "masked_lm": {"labels": ids},
        "pretraining": {"labels": ids % 2} | ({"next_sentence_label": first % 2} if type(model) is BERT_PRE else {}),
    }
    out = model(**inputs, **labels[task])
    return out.last_hidden_state.square().mean() if task == "base" else out.loss


BERT_PRE = transformers.BertForPreTraining


@pytest.mark.parametrize("family,task", EVERY)
def test_every_head(family, task, tmp_path):
    """It trains, and nothing else outside the blocks; compact it equals the masked one, in files and out."""
    model, inputs = build(family, task), inputs_of(task)
    pruner = attached(model)
    loss_of(model.train(), task, inputs).backward()
    assert [n for n, p in model.named_parameters() if (p.grad is not None) != p.requires_grad] == []
    words, prefix = model.get_output_embeddings(), model.base_model_prefix + "."
    head = [p for n, p in model.named_parameters() if not n.startswith(prefix) or n.startswith(prefix + "pooler.")]
    head = [p for p in head if task != "base" and (words is None or p is not words.weight)]
    assert {id(p) for p in task_head(model)} == {id(p) for p in head} and bool(head) == (task != "base")

    prune(pruner, 0.4)
    small = check(model.eval(), inputs, F32)
    want = logits(small, inputs)
    assert torch.equal(logits(pickle.loads(pickle.dumps(small)), inputs), want)
    pk.save(small, tmp_path)
    for loaded in (pk.load(tmp_path), getattr(transformers, AUTO[task]).from_pretrained(tmp_path)):
        assert type(loaded) is CLASSES[family, task]
        assert torch.equal(logits(loaded, inputs), want)


@pytest.mark.parametrize("family", RELATIVES)
def test_a_base_model_loads_under_a_head_and_out_of_one(family, tmp_path):
    model, small = compacted(family, "base")
    pk.save(small, tmp_path / "base")
    under = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(under.base_model, batch()), logits(small, batch()))
    pk.save(under, tmp_path / "head")
    out = transformers.AutoModel.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(logits(out, batch()), logits(small, batch()))


# -- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ("xlm-roberta", "camembert", "electra"))
@pytest.mark.parametrize("field", ("is_decoder", "add_cross_attention"))
def test_decoders_are_refused(family, field):
    options = {"is_decoder": True, field: True}
    with pytest.raises(ValueError, match=f"is_decoder and add_cross_attention must be False.*{family} as an encoder"):
        pk.attach(build(family, "base", **options))


@pytest.mark.parametrize("family", (*FAMILIES, *RELATIVES))
def test_the_longest_sequence(family):
    """One token more has no position."""
    model = build(family, "base")
    most = families.most_tokens(model)
    assert most == 40 - (PAD + 1 if family in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0)
    assert logits(model, batch(1, most, padded=False)).shape == (1, most, HIDDEN)
    with pytest.raises((IndexError, RuntimeError)):
        logits(model, batch(1, most + 1, padded=False))
    with pytest.raises(ValueError, match=f"tokens must be at most {most}"):
        latency({"dense": model}, 1, most + 1)


def test_positions_begin_after_that_of_padding():
    """Wherever that is; MPNet's is 1 in every config."""
    for family, padding, most in (("xlm-roberta", 0, 39), ("camembert", 4, 35), ("mpnet", 0, 38), ("electra", 4, 40)):
        model = build(family, "base", pad_token_id=padding)
        ids = torch.full((1, most), 7)
        assert families.most_tokens(model) == most and logits(model, {"input_ids": ids}).isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            logits(model, {"input_ids": torch.full((1, most + 1), 7)})


@pytest.mark.parametrize("family", RELATIVES)
def test_stock_checkpoint(family, tmp_path):
    """Loaded by transformers alone, in its own classes, of a narrower FFN."""
    model = build(family, dtype=torch.float64)
    pruner = attached(model, sparsity=0.3)
    pruner.finalize("stock")
    pk.save_stock(model, tmp_path)
    stock = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert not [m for m in stock.modules() if type(m).__module__.startswith("prunekern")]
    assert stock.config.intermediate_size < FFN
    assert difference(logits(stock.eval(), batch()), logits(model.eval(), batch())) <= F64


# -- MPNet's attention -----------------------------------------------------------------------------------------------

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
