"""Compact decoders equal masked ones: logits of attended positions, with and without cache, and generated tokens."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import prunekern as pk
from prunekern import _native
from prunekern.families.key_masks import causal_key_mask_of, key_mask_of
from tests.helpers.decoder_checks import check, generated, logits
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_decoders import FAMILIES, HEAD_DIM, LAYERS, batch, build, names
from tests.helpers.tiny_models import attached, difference, keep_only, prune, watch

PAIRS = HEAD_DIM // 2
SHARES = (0.0, 0.3, 0.8, 0.97, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_masked(family, attention, share):
    in_float64 = F64 if attention == "sdpa" else 1e-6  # transformers' "eager" has its softmax in float32
    for dtype, tolerance in ((torch.float64, in_float64), (torch.float32, F32)):
        model = build(family, attention=attention, dtype=dtype)
        prune(attached(model), share, seed=1)
        small = pk.compact(model)
        for size, padded in ((1, False), (4, False), (4, True)):
            if padded and attention == "eager" and dtype == torch.float64:
                continue  # transformers' eager attention gives NaN for padding there
            check(model, batch(size, padded=padded), tolerance, small)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_runs_on_the_kernels(family, monkeypatch):
    """Prompts, left-padded ones too, and single tokens after them: nothing is padded, everything is packed."""
    assert _native.available(), _native.why_not()
    model = build(family)
    prune(attached(model), 0.3)
    small, inputs = pk.compact(model), batch(2)
    calls = watch(monkeypatch)
    one = ["compact_linear", "compact_attention", "compact_linear", "compact_mlp"] * LAYERS
    logits(small, inputs)
    assert calls == one
    generated(small, inputs, 3)
    assert calls == one * 4


def test_one_mask_for_all_sequences():
    """A mask of one's own, [1, 1, tokens, tokens], meets a batch of three."""
    model = build()
    prune(attached(model), 0.3)
    small, ids = pk.compact(model), batch(3, padded=False)["input_ids"]
    seen = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    seen[..., :2] = False
    with torch.no_grad():
        got, want = (m(input_ids=ids, attention_mask=seen).logits[:, 2:] for m in (small, model))
    assert difference(got, want) <= F32


def test_which_masks_are_causal_with_whole_keys_forbidden():
    seen = torch.ones(1, 1, 4, 6, dtype=torch.bool).tril(2)
    assert causal_key_mask_of(None) == (True, None)
    assert causal_key_mask_of(seen)[1].tolist() == [[True] * 6]
    padded = seen.clone()
    padded[..., :2] = False
    assert causal_key_mask_of(padded)[1].tolist() == [[False, False, True, True, True, True]]
    window = seen & ~torch.ones_like(seen).tril(0)
    for other in (window, seen.float(), seen.expand(1, 2, 4, 6), seen[0], seen.mT):
        assert causal_key_mask_of(other) == (False, None)
    assert causal_key_mask_of(window[:, :, -1:])[1].tolist() == window[0, 0, -1:].tolist()  # one query: any keys
    assert key_mask_of(seen) == (False, None)  # the question counts, not the mask alone
    assert causal_key_mask_of(seen)[0]


@pytest.mark.parametrize("share", (0.3, 0.8, 1.0))
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_equals_at_once(family, share):
    """Logits with a cache, fed in pieces of 5, 1, 1 and 2 tokens, equal those of the masked model without one."""
    model = build(family, dtype=torch.float64)
    prune(attached(model), share, seed=2)
    small = pk.compact(model)
    inputs = batch(3, 9)
    want = logits(model, inputs)
    cache, parts, first = DynamicCache(config=small.config), [], 0
    for last in (5, 6, 7, 9):
        with torch.no_grad():
            out = small(
                input_ids=inputs["input_ids"][:, first:last],
                attention_mask=inputs["attention_mask"][:, :last],
                position_ids=torch.arange(first, last)[None],
                past_key_values=cache,
            )
        parts.append(out.logits)
        first = last
    assert cache.get_seq_length() == 9
    assert difference(torch.cat(parts, 1)[inputs["attention_mask"].bool()], want) <= F64


@pytest.mark.parametrize("share", (0.3, 0.8))
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_tokens(family, share):
    """64 tokens of a left-padded batch, greedy and by beam search, with dynamic and static caches and with none."""
    model = build(family, dtype=torch.float64)
    prune(attached(model), share, seed=3)
    small = pk.compact(model)
    inputs = batch(3, 7)
    want = generated(model, inputs)
    assert want.shape == (3, 7 + 64)
    assert torch.equal(generated(small, inputs), want)
    assert torch.equal(generated(small, inputs, use_cache=False), want)
    assert torch.equal(generated(small, inputs, cache_implementation="static"), want)
    beams = generated(model, inputs, 16, num_beams=3)
    assert torch.equal(generated(small, inputs, 16, num_beams=3), beams)


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_generates_the_same_tokens(family, padded):
    """On the kernels; a static cache has empty slots after the prompt."""
    model = build(family)
    prune(attached(model), 0.4, seed=4)
    small = pk.compact(model)
    inputs = batch(2, 9, padded=padded)
    want = generated(model, inputs)
    assert torch.equal(generated(small, inputs), want)
    assert torch.equal(generated(small, inputs, cache_implementation="static"), want)
    cache = StaticCache(small.config, max_cache_len=32)
    assert difference(logits(small, inputs, past_key_values=cache), logits(model, inputs)) <= F32


@pytest.mark.parametrize(
    "family, changes",
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(family, changes):
    model = build(family, dtype=torch.float64, **changes)
    prune(attached(model), 0.5, seed=5)
    small = check(model, batch(3, 12), F64)
    inputs = batch(1, 6)
    assert torch.equal(generated(small, inputs, 24), generated(model, inputs, 24))


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 8,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_rotary_type_that_has_a_rule(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    model = build(dtype=torch.float64, rope_parameters=rope)
    prune(attached(model), 0.5, seed=6)
    check(model, batch(3, 14), F64)


def test_each_head_keeps_its_own_frequencies():
    """Pairs kept are different ones in each head, and not the first ones."""
    model = build(dtype=torch.float64)
    pruner = attached(model)
    q = names()["q"]
    keep_only(pruner, {q: np.array([0, 0, 0, 0, 1, 1] + [0, 1, 0, 0, 0, 0], bool)})
    small = check(model, batch(3), F64)
    layout = small.model.layers[0].self_attn.layout
    assert layout.key_first == (0, 4, 6)
    assert layout.turn[layout.key].tolist() == [4, 5, 4 + PAIRS, 5 + PAIRS, 1, 1 + PAIRS]
