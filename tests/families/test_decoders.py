"""Compact decoders equal masked ones: logits of attended positions, with and without cache, and generated tokens."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_decoders import FAMILIES, FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, batch, build, names, reference
from tiny_models import attached, difference, keep_only, prune, state, unchanged, watch
from transformers import DynamicCache, StaticCache

import prunekern as pk
from prunekern import _native, checkpoint
from prunekern.families.blocks import causal_key_mask_of, key_mask_of
from prunekern.nn import CompactLinear

F64, F32 = 1e-10, 1e-4  # the promise: max |difference| of logits relative to max |logit|
PAIRS = HEAD_DIM // 2
SHARES = (0.0, 0.3, 0.8, 0.97, 1.0)


@torch.no_grad()
def logits(model, inputs, **options):
    """[attended positions, vocabulary]"""
    return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


def check(model, inputs, tolerance, small=None):
    small = pk.compact(model) if small is None else small
    masked = logits(model, inputs)
    assert difference(masked, logits(reference(model), inputs)) <= tolerance
    assert difference(logits(small, inputs), masked) <= tolerance
    return small


def generated(model, inputs, tokens=64, **options):
    return model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )


# -- the core promise ------------------------------------------------------------------------------------------


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


# -- edges -----------------------------------------------------------------------------------------------------


def test_head_without_values_vanishes_with_its_queries():
    model = build(dtype=torch.float64)
    v = names()["v"]
    keep_only(attached(model), {v: np.arange(KV_HEADS * HEAD_DIM) >= HEAD_DIM})
    small = check(model, batch(3), F64)
    attention = small.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (HEADS // KV_HEADS * HEAD_DIM, HIDDEN)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (HEAD_DIM, HIDDEN)
    assert attention.o_proj.weight.shape == (HIDDEN, HEADS // KV_HEADS * HEAD_DIM)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", ["v", "q", "up", "o", "down"])
def test_whole_masks_gone(family, gone):
    """No values: the layer's attention is o's bias. No pairs: heads average. Generation goes on in every case."""
    model = build(family, dtype=torch.float64)
    pruner = attached(model)
    if family == "qwen3" and gone == "q":
        assert names()["q"] not in pruner.masks
        return
    for layer in range(LAYERS):
        name = names(layer)[gone]
        keep_only(pruner, {name: np.zeros(pruner.masks[name].logits.numel(), bool)})
        small = check(model, batch(3), F64)
        assert torch.equal(generated(small, batch(2), 8), generated(model, batch(2), 8))


def test_generation_that_needs_removed_heads_is_refused():
    """Weights of the heads left are given; where a block has none, the tuple would be one short and shifted."""
    model = build(attention="eager", dtype=torch.float64)
    pruner = attached(model)
    keep_only(pruner, {names(1)["v"]: np.arange(KV_HEADS * HEAD_DIM) >= HEAD_DIM})
    asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2, "do_sample": False}
    small = pk.compact(model)
    weights = small.generate(**batch(1), **asked).attentions[0]
    assert [w.shape[1] for w in weights] == [HEADS, HEADS // KV_HEADS]
    keep_only(pruner, {names(1)["v"]: np.zeros(KV_HEADS * HEAD_DIM, bool)})
    small = pk.compact(model)
    with pytest.raises(ValueError, match=r"output_attentions must be False \(got True\): block 1 .* no attention head"):
        small.generate(**batch(1), **asked)
    small.generation_config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False"):
        small.generate(**batch(1), max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with torch.no_grad():
        assert small(**batch(1)).logits.isfinite().all()


def test_qwen3_keeps_queries_and_keys():
    model = build("qwen3")
    pruner = prune(attached(model), 0.9, seed=1)
    kinds = {g.kind for g in pruner.table.groups.values()}
    assert kinds == {"value", "ffn", "residual"}
    attention = pk.compact(model).model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (HEADS * HEAD_DIM, HIDDEN)
    assert attention.k_proj.weight.shape == (KV_HEADS * HEAD_DIM, HIDDEN)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_masks(data):
    model = build(dtype=torch.float64, layers=1, seed=data.draw(st.integers(0, 3)))
    pruner = attached(model)
    kept = {}
    for name, mask in pruner.masks.items():
        share = data.draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        kept[name] = rng.random(mask.logits.numel()) >= share
    keep_only(pruner, kept)
    check(model, batch(2, 6), F64)


# -- the table -------------------------------------------------------------------------------------------------


def test_groups_of_a_block_by_hand():
    """Pair 1 of key/value head 1: k rows 13 and 19; the same in query heads 3, 4 and 5."""
    pruner = attached(build())
    n, table = names(), pruner.table
    query = table.groups[n["q"]]
    index = PAIRS + 1
    assert sorted(query.rows[index].tolist()) == [h * HEAD_DIM + j for h in (3, 4, 5) for j in (1, 7)]
    assert query.removed_rows[n["k"]][index].tolist() == [13, 19]
    assert int(query.head[index]) == 1 and query.lives_by == n["v"]
    value = table.groups[n["v"]]
    assert value.rows[14].tolist() == [14]
    assert value.removed_cols[n["o"]][14].tolist() == [38, 50, 62]
    ffn = table.groups[n["up"]]
    assert ffn.removed_rows[n["gate"]].tolist() == ffn.removed_cols[n["down"]].tolist() == [[i] for i in range(FFN)]


@pytest.mark.parametrize("align", (1, 4))
@pytest.mark.parametrize("share", (0.2, 0.5))
def test_budget_is_met(share, align):
    model = build()
    pruner = attached(model, sparsity=share, align=align)
    pruner.finalize()
    plan = pk.plan(model)
    assert share <= plan.sparsity() < share + 0.02 * align
    small = pk.compact(model)
    held = sum(p.numel() for m in small.modules() if isinstance(m, CompactLinear) for p in m.parameters())
    assert held == plan.params()


# -- cache, memory, structure ----------------------------------------------------------------------------------


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
@pytest.mark.parametrize("kind", ("bf16", "int8"))
def test_smaller_weights_of_blocks_and_head(kind, tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    prune(attached(model), 0.5, seed=10)
    pk.save(pk.compact(model), tmp_path / "a")
    exact, inputs = logits(pk.load(tmp_path / "a"), batch(3)), batch(3)
    small = pk.load(tmp_path / "a", weights=kind)
    assert isinstance(small.lm_head, CompactLinear) and small.lm_head.weights == kind
    assert small.model.embed_tokens.weight.dtype == torch.float32
    got = logits(small, inputs)
    assert 0 < difference(got, exact) <= 0.1
    assert generated(small, inputs, 4).shape == (3, 13)
    # On disk it is as if it had never been rounded where it is tied, and in every case it comes back.
    pk.save(small, tmp_path / "b")
    assert small.lm_head.weights == kind and torch.equal(logits(small, inputs), got)
    again = pk.load(tmp_path / "b")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    if tied:
        assert torch.equal(again.lm_head.weight, pk.load(tmp_path / "a").lm_head.weight)
    small.save_pretrained(tmp_path / "c")  # transformers' own way
    assert difference(logits(pk.load(tmp_path / "c"), inputs), exact) <= 0.1
    checkpoint.set_weights(small, "fp32")
    assert (small.lm_head.weight is small.model.embed_tokens.weight) is tied
    assert difference(logits(small, inputs), exact) <= 0.1


@pytest.mark.parametrize("kind", ("bf16", "int8"))
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
    assert 0 < difference(small.lm_head.plain_weight().float(), wanted) <= 1e-2


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


# -- bad input -------------------------------------------------------------------------------------------------


def test_rotary_types_without_a_rule_are_refused():
    model = build()
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type must be one of default, linear.*got 'spiral'"):
        pk.attach(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor 0.5"):
        pk.attach(model)


def test_split_groups_are_refused():
    """A plan edited by hand that drops half of a pair, in one query head of three."""
    from prunekern.plan import LayerPlan, Plan, check

    model = build()
    pruner = keep_only(attached(model), {})
    plan = pruner.plan()
    q = plan.layers[names()["q"]]
    rows = q.rows[q.rows != 2]
    edited = Plan(plan.layers | {names()["q"]: LayerPlan(rows, q.cols, q.out_features, q.in_features, q.bias)})
    with pytest.raises(
        ValueError, match=r"split a channel group: row 8 is kept, row 2 is not \(rows \[2, 8, 14, 20, 26, 32\]"
    ):
        check(edited, pruner.table)
