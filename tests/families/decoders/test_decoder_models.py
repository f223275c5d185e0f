"""Compact decoders as models: the cache's size, tied embeddings, round trips, weights in fewer bits, training."""

import pytest
import torch

import prunekern as pk
from prunekern.compacting import checkpoint
from prunekern.nn import CompactLinear
from tests.helpers.decoder_checks import generated, logits
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_decoders import FAMILIES, HEAD_DIM, KV_HEADS, LAYERS, batch, build, names, reference
from tests.helpers.tiny_models import attached, difference, prune, state, unchanged


def cache_bytes(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def test_cache_holds_kept_channels_only():
    model = build()
    pruner = attached(model)
    dense = cache_bytes(model, batch(2))
    prune(pruner, 0.5, seed=7)
    small, plan = pk.compact(model), pk.plan(model)
    kept = sum(plan.layers[names(i)[which]].rows.numel() for i in range(LAYERS) for which in "kv")
    assert cache_bytes(small, batch(2)) == dense * kept // (LAYERS * 2 * KV_HEADS * HEAD_DIM)
    assert kept < LAYERS * 2 * KV_HEADS * HEAD_DIM * 0.6


def test_input_stays_and_embeddings_stay_tied():
    model = build(tie_word_embeddings=True)
    prune(attached(model), 0.5)
    before = state(model)
    small = pk.compact(model)
    unchanged(model, before)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight is not model.lm_head.weight


def test_language_model_head_is_not_trained():
    for tied in (False, True):
        model = build(tie_word_embeddings=tied)
        pk.attach(model, pk.PruneConfig(rank=4))
        assert not model.lm_head.weight.requires_grad and not model.model.embed_tokens.weight.requires_grad
    model = build(task="sequence")
    pk.attach(model, pk.PruneConfig(rank=4))
    assert model.score.weight.requires_grad


def test_other_heads():
    for task in ("base", "sequence"):
        model = build(task=task, dtype=torch.float64)
        prune(attached(model), 0.5, seed=8)
        small, inputs = pk.compact(model), batch(3)
        with torch.no_grad():
            got, want, exact = small(**inputs), model(**inputs), reference(model)(**inputs)
        key = "logits" if task == "sequence" else "last_hidden_state"
        keep = slice(None) if task == "sequence" else inputs["attention_mask"].bool()
        assert difference(want[key][keep], exact[key][keep]) <= F64
        assert difference(got[key][keep], want[key][keep]) <= F64


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    model = build(family)
    prune(attached(model), 0.5, seed=9)
    small, inputs = pk.compact(model), batch(3)
    pk.save(small, tmp_path / "a")
    again = pk.load(tmp_path / "a")
    assert torch.equal(logits(again, inputs), logits(small, inputs))
    pk.save(again, tmp_path / "b")
    assert pk.plan(pk.load(tmp_path / "b")) == pk.plan(model)


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("kind", ("bf16", "int8", "int4"))
def test_smaller_weights_of_blocks_and_head(kind, tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    prune(attached(model), 0.5, seed=10)
    pk.save(pk.compact(model), tmp_path / "a")
    exact, inputs = logits(pk.load(tmp_path / "a"), batch(3)), batch(3)
    small = pk.load(tmp_path / "a", weights=kind)
    assert isinstance(small.lm_head, CompactLinear) and small.lm_head.weights == kind
    assert small.model.embed_tokens.weight.dtype == torch.float32
    got = logits(small, inputs)
    bound = 0.6 if kind == "int4" else 0.1
    assert 0 < difference(got, exact) <= bound
    assert generated(small, inputs, 4).shape == (3, 13)
    # On disk it is as if it had never been rounded where it is tied, and in every case it comes back.
    pk.save(small, tmp_path / "b")
    assert small.lm_head.weights == kind and torch.equal(logits(small, inputs), got)
    again = pk.load(tmp_path / "b")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    if tied:
        assert torch.equal(again.lm_head.weight, pk.load(tmp_path / "a").lm_head.weight)
    small.save_pretrained(tmp_path / "c")  # transformers' own way
    assert difference(logits(pk.load(tmp_path / "c"), inputs), exact) <= bound
    checkpoint.set_weights(small, "fp32")
    assert (small.lm_head.weight is small.model.embed_tokens.weight) is tied
    assert difference(logits(small, inputs), exact) <= bound


@pytest.mark.parametrize("kind", ("bf16", "int8", "int4"))
def test_a_rounded_head_tied_again_is_rounded_again(kind, tmp_path):
    model = build(tie_word_embeddings=True)
    prune(attached(model), 0.5, seed=10)
    pk.save(pk.compact(model), tmp_path)
    small, inputs = pk.load(tmp_path, weights=kind), batch(3)
    before = logits(small, inputs)
    small.tie_weights()
    assert small.lm_head.weights == kind and torch.equal(logits(small, inputs), before)
    with torch.no_grad():
        small.model.embed_tokens.weight *= 2
    small.tie_weights()
    wanted = pk.load(tmp_path).model.embed_tokens.weight * 2
    assert small.lm_head.weights == kind and torch.equal(small.model.embed_tokens.weight, wanted)
    assert 0 < difference(small.lm_head.plain_weight().float(), wanted) <= (0.1 if kind == "int4" else 1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_shrunk_training_equals_masked(family):
    """Loss and gradients of what stays trainable, with and without the pruned channels dropped."""
    losses = []
    for shrink in (False, True):
        model = build(family, dtype=torch.float64)
        pruner = prune(attached(model), 0.5, seed=11)
        for mask in pruner.masks.values():
            mask.finalize(mask.kept())
        if shrink:
            pruner.shrink()
        model.train()
        inputs = batch(3)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        steps = []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            loss = model(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pruner.step()
            steps.append(loss.item())
        losses.append(steps)
        assert difference(logits(pk.compact(model), inputs), logits(model.eval(), inputs)) <= F64
    # A shrunk layer's magnitude stands for another norm: plain SGD takes it another way after the first step.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-12)
    assert losses[1][2] < losses[1][0] and losses[0][2] < losses[0][0]


def test_gradient_checkpointing_equals_plain():
    grads = []
    for checkpointing in (False, True):
        model = build(dtype=torch.float64)
        pruner = attached(model, sparsity=0.3)
        pruner.finalize()
        pruner.shrink()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        inputs = batch(2)
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_hooks_on_the_ffn_are_called():
    model = build()
    prune(attached(model), 0.5, seed=12)
    small, inputs, seen = pk.compact(model), batch(2), []
    want = logits(small, inputs)
    handle = small.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert difference(logits(small, inputs), want) <= F32 and seen == [1]
    handle.remove()
