"""Pipelines, ways of generating, checkpointing and what else transformers does with a model: as with the dense one.

Lines of docs/guides/other-libraries.md. The reference is the masked model, whose blocks are transformers' own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import pipeline

import prunekern as pk
from tests.habits.test_other_libraries import KINDS, close, model_of
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.tiny_tokenizer import word_tokenizer

TEXTS = ["the cat sat on a mat", "a dog saw some birds"]
PIPELINES = {
    "text-classification": [("distilbert", "sequence"), ("roberta", "sequence"), ("llama", "sequence")],
    "token-classification": [("bert", "token")],
    "feature-extraction": [("distilbert", "base"), ("bert", "base"), ("llama", "base")],
    "fill-mask": [("distilbert", "masked_lm"), ("roberta", "masked_lm")],
    "text-generation": [("llama", "causal"), ("qwen3", "causal")],
}


def flat(answer):
    """Everything in an answer, in order."""
    values = answer.values() if isinstance(answer, dict) else answer
    return [leaf for v in values for leaf in (flat(v) if isinstance(v, (dict, list)) else [v])]


def same_answer(got, want):
    got, want = flat(got), flat(want)
    texts = [[leaf for leaf in leaves if isinstance(leaf, str)] for leaves in (got, want)]
    values = [[float(leaf) for leaf in leaves if not isinstance(leaf, str)] for leaves in (got, want)]
    return texts[0] == texts[1] and values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "family", "head"), [(t, *m) for t, models in PIPELINES.items() for m in models])
def test_pipelines(task, family, head, tmp_path):
    """Of a model, and of a folder, with every way of saying where."""
    masked = (tiny_decoders if family in tiny_decoders.FAMILIES else tiny_models).build(family, head)
    tiny_models.prune(tiny_models.attached(masked), 0.3)
    small, tokenizer = pk.compact(masked), word_tokenizer()
    tokenizer.mask_token = "<unk>"
    texts = [text.replace("cat", "<unk>").replace("dog", "<unk>") for text in TEXTS] if task == "fill-mask" else TEXTS
    options = {"max_new_tokens": 6, "do_sample": False} if task == "text-generation" else {}
    want = pipeline(task, model=masked, tokenizer=tokenizer, device="cpu")(texts, **options)
    pk.save(small, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    folder = str(tmp_path)
    for made in (
        pipeline(task, model=small, tokenizer=tokenizer, device="cpu"),
        pipeline(task, model=folder, device="cpu"),
        pipeline(task, model=folder, device_map="cpu"),
    ):
        assert type(made.model) is type(masked)
        assert same_answer(made(texts, **options), want)


GENERATING = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "prompt in chunks": {"prefill_chunk_size": 2},
    "assistant": {"assistant_model": None},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", tiny_decoders.FAMILIES)
@pytest.mark.parametrize("how", GENERATING)
def test_ways_of_generating(how, family):
    """The tokens of the masked model, whether a cache's last axis is a head's or all kept channels."""
    masked, inputs = model_of("masked", family)
    small, options = pk.compact(masked), GENERATING[how]
    found = []
    for model in (masked, small):
        if "assistant_model" in options:  # a compact model drafts for the model it was made of, and for itself
            options = {"assistant_model": copy.deepcopy(small)}
        torch.manual_seed(0)
        ids = inputs["input_ids"][:1, :5]
        found.append(
            model.generate(ids, **{"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
                           | options)
        )  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["distilbert", "bert", "llama", "qwen3"])
@torch.no_grad()
def test_hidden_states_and_attentions(family):
    """Attentions want "eager" attention, as in transformers; heads are those that are left."""
    masked, inputs = model_of("masked", family)
    small, real = pk.compact(masked), inputs["attention_mask"].bool()
    want = masked(**inputs, output_hidden_states=True)
    got = small(**inputs, output_hidden_states=True)
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        close(mine[real], theirs[real])
    small.set_attn_implementation("eager")
    found = small(**inputs, output_attentions=True).attentions
    assert len(found) == 2 and all(weights.shape[0] == 4 and weights.shape[2:] == (9, 9) for weights in found)
    for weights in found:  # of each token that is there, over those that are
        close(weights.sum(-1).transpose(1, 2)[real], torch.ones(()).expand(int(real.sum()), weights.shape[1]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, family):
    model, inputs = model_of(kind, family)
    if kind == "compact":
        model.requires_grad_(True)
    options = {"use_cache": False} if family == "llama" else {}

    def gradients():
        model.zero_grad()
        model.train()(**inputs, **options)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(want) > 20
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["distilbert", "llama"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_torch_compile_of_a_model(kind, family):
    """Wrapped after it was made, called before or not; `compact` and `save` take it out: test_wrapped_models.py."""
    torch.compiler.reset()
    model, inputs = model_of(kind, family)
    for called_before in (False, True):
        fresh = copy.deepcopy(model)
        if called_before:
            fresh(**inputs)
        close(torch.compile(fresh, backend="aot_eager", fullgraph=True)(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_and_pickles_of_a_model(kind, tmp_path):
    for family in ("distilbert", "llama"):
        model, inputs = model_of(kind, family)
        want = model(**inputs)[0]
        torch.save(model, tmp_path / "whole.pt")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
            assert torch.equal(twin(**inputs)[0], want)
            for parameter in twin.parameters():
                parameter.data.mul_(0.3)
            assert torch.equal(model(**inputs)[0], want)  # nothing is shared
            twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            close(twin(**inputs)[0], want)
