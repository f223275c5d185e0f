"""Encoders with BERT's block under other names, and every head of all of them: as the others, in fewer mixtures."""

import pickle

import pytest
import torch
import transformers

import prunekern as pk
import prunekern.hf
from prunekern import families
from prunekern.compacting.latency import latency
from prunekern.pruning.attach import task_head
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_models import (
    CLASSES,
    FAMILIES,
    FFN,
    HIDDEN,
    PAD,
    RELATIVES,
    attached,
    batch,
    build,
    difference,
    logits,
    prune,
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
