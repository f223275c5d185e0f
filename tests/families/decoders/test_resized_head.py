"""Heads of compact models are `nn.Linear`s to transformers and PEFT: tokens added after loading, adapters on top.

Baichuan2 #49: a head of a class of its own, and `resize_token_embeddings` stopped half way.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern.compacting import checkpoint
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.tiny_decoders import VOCAB, batch, build
from tests.helpers.tiny_models import attached, difference, logits, prune

KINDS = ("fp32", "bf16", "int8", "int4")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    model = build(tie_word_embeddings=request.param)
    prune(attached(model), 0.5, seed=10)
    path = tmp_path_factory.mktemp("head") / "m"
    pk.save(pk.compact(model), path)
    return path


def is_tied(model):
    return model.config.tie_word_embeddings


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_added_after_loading(kind, mean, folder, tmp_path):
    small, inputs = pk.load(folder, weights=kind), batch(3)
    before = logits(small, inputs)
    embeddings = small.resize_token_embeddings(VOCAB + 3, mean_resizing=mean)
    assert embeddings is small.get_input_embeddings() and small.config.vocab_size == VOCAB + 3
    assert type(small.lm_head).__name__ in ("LinearHead", "Head") and small.lm_head.weights == kind
    assert (
        small.lm_head.plain_weight().shape == (VOCAB + 3, small.config.hidden_size)
        and small.lm_head.out_features == VOCAB + 3
    )
    got = logits(small, inputs)
    assert got.shape[-1] == VOCAB + 3 and difference(got[..., :VOCAB], before) <= 1e-6
    new = embeddings.weight if is_tied(small) else small.lm_head.plain_weight().float()
    with torch.no_grad():
        hidden = small.model(**inputs).last_hidden_state
    bound = {"fp32": 1e-5, "bf16": 2e-2, "int8": 4e-2, "int4": 0.3}[kind]
    assert difference(got[..., VOCAB:], hidden @ new[VOCAB:].T) <= bound
    if is_tied(small) and kind == "fp32":
        assert small.lm_head.weight is embeddings.weight
    inputs["input_ids"][:, -1] = VOCAB + 2
    got = logits(small, inputs)
    pk.save(small, tmp_path / "m")
    again = pk.load(tmp_path / "m", weights=kind)
    assert difference(logits(again, inputs), got) <= 1e-6
    small.save_pretrained(tmp_path / "theirs")
    assert pk.load(tmp_path / "theirs").config.vocab_size == VOCAB + 3
    small.resize_token_embeddings(VOCAB)  # and fewer again
    assert difference(logits(small, batch(3)), before) <= 1e-6


@pytest.mark.parametrize("pad", [None, 8])
def test_the_other_arguments(pad, folder):
    small = pk.load(folder, weights="int8")
    assert small.resize_token_embeddings() is small.get_input_embeddings() and small.config.vocab_size == VOCAB
    small.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=pad)
    assert small.config.vocab_size == (VOCAB + 1 if pad is None else 64) == small.lm_head.weight.shape[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_leaves_the_head(kind, folder):
    small = pk.load(folder, weights=kind)
    head, before = small.lm_head, logits(small, batch(3))
    with pytest.raises(ValueError, match="to a multiple of `1.5`"):
        small.resize_token_embeddings(VOCAB + 1, pad_to_multiple_of=1.5)
    assert small.lm_head is head and torch.equal(logits(small, batch(3)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_resize_themselves(kind, folder):
    small = pk.load(folder, weights=kind)
    twin = copy.deepcopy(small)
    twin.resize_token_embeddings(VOCAB + 2)
    assert small.config.vocab_size == VOCAB == small.lm_head.weight.shape[0]
    assert twin.lm_head.weights == kind and twin.lm_head.weight.shape[0] == VOCAB + 2
    read = pickle.loads(pickle.dumps(small))
    assert torch.equal(logits(read, batch(3)), logits(small, batch(3)))
    if kind == "fp32":
        read.resize_token_embeddings(VOCAB + 2)
        assert read.lm_head.weight.shape[0] == VOCAB + 2


def test_no_circle_keeps_the_model(folder):
    small = pk.load(folder, weights="int8")
    gone = weakref.ref(small.model)
    gc.collect()
    gc.disable()
    try:
        del small
        assert gone() is None
    finally:
        gc.enable()


def test_in_other_dtypes(folder):
    for dtype in (torch.float64, torch.bfloat16):
        small = pk.load(folder).to(dtype)
        small.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        assert {p.dtype for p in small.parameters()} == {dtype} and small.lm_head.weight.shape[0] == VOCAB + 3


def test_a_linear_for_all_but_int8_and_int4(folder):
    small = pk.load(folder)
    for kind in ("fp32", "bf16", "int8", "int4", "fp32"):
        checkpoint.set_weights(small, kind)
        assert isinstance(small.lm_head, nn.Linear) is (
            kind not in ("int8", "int4")
        )  # such a weight alone says nothing
        assert small.lm_head.in_features == small.config.hidden_size and small.lm_head.out_features == VOCAB


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_on_the_head(kind, folder):
    peft = pytest.importorskip("peft")
    small = pk.load(folder, weights=kind)
    want, config = logits(small, batch(3)), peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    if kind in ("int8", "int4"):
        with pytest.raises(ValueError, match="Head.* is not supported"):
            peft.get_peft_model(small, config)
        return
    model = peft.get_peft_model(small, config)
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        hidden = model.base_model.model.model(**batch(3)).last_hidden_state
        delta = layer.scaling["default"] * hidden @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    assert difference(logits(model, batch(3)), want + delta) <= 1e-5


@pytest.mark.parametrize("family,task", [("distilbert", "sequence"), ("bert", "masked_lm"), ("llama", "sequence")])
def test_tokens_added_to_other_compact_models(family, task, tmp_path):
    module = tiny_decoders if family == "llama" else tiny_models
    model = module.build(family, task)
    prune(attached(model), 0.5)
    pk.save(pk.compact(model), tmp_path / "m")
    small, inputs = pk.load(tmp_path / "m"), module.batch()
    before, size = logits(small, inputs), small.config.vocab_size
    small.resize_token_embeddings(size + 3)
    got = logits(small, inputs)
    assert difference(got[..., :size] if task == "masked_lm" else got, before) <= 1e-6
    inputs["input_ids"][:, 1] = size + 2
    pk.save(small, tmp_path / "again")
    assert difference(logits(pk.load(tmp_path / "again"), inputs), logits(small, inputs)) <= 1e-6
