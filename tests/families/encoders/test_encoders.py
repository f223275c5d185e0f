"""Compact output equals masked output, and both equal a stock model whose weights are merged by the definition."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prunekern as pk
from prunekern import _native
from prunekern.families.key_masks import key_mask_of
from prunekern.nn import CompactAttention, CompactLinear
from prunekern.nn.packed import pack_all
from tests.helpers.equal_models import F32, F64, check
from tests.helpers.tiny_models import (
    FAMILIES,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    TASKS,
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

# -- the core promise ------------------------------------------------------------------------------------------

SHARES = (0.0, 0.3, 0.8, 0.97, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_masked(family, task, attention, share):
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build(family, task, attention, dtype)
        prune(attached(model), share, seed=1)
        small = pk.compact(model)
        for size, padded in ((1, False), (1, True), (8, True)):
            check(model, batch(size, padded=padded), tolerance, small)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fp32_runs_on_the_kernels(family, attention, monkeypatch):
    """The fp32 half of the promise is about the C++ kernels: they must be what runs, each on packed weights."""
    assert _native.available(), _native.why_not()
    model = build(family, attention=attention)
    prune(attached(model), 0.3)
    small = pk.compact(model)
    calls = watch(monkeypatch)
    logits(small, batch())
    if attention == "sdpa":
        one = ["encoder_block"]
    else:
        one = ["compact_linear"] * 4 + ["compact_mlp"]
    assert calls == one * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_takes_padded_heads(family, monkeypatch):
    """Gradients and masks of more than keys: same answers, without ragged heads. Hooks on projections: with them."""
    model = build(family)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    inputs = batch(padded=False)
    want = logits(small, inputs)
    calls = watch(monkeypatch)

    small.requires_grad_(True)
    out = small(**inputs).logits
    assert difference(out.detach(), want) <= F32 and out.requires_grad
    assert "compact_attention" not in calls
    small.requires_grad_(False)

    length = inputs["input_ids"].shape[1]
    causal = torch.ones(len(inputs["input_ids"]), 1, length, length, dtype=torch.bool).tril()
    by_causal = {**inputs, "attention_mask": causal}
    assert difference(logits(small, by_causal), logits(model, by_causal)) <= F32
    assert difference(logits(small, by_causal), want) > 1e-3

    assert "compact_attention" not in calls
    heard = []
    names_of_linears = [n for n, m in small.named_modules() if isinstance(m, CompactLinear)]
    handles = [
        small.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: heard.append(n)) for n in names_of_linears
    ]
    assert difference(logits(small, inputs), want) <= F32
    assert sorted(heard) == sorted(names_of_linears)
    for handle in handles:
        handle.remove()
    assert calls.count("compact_attention") == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [1, 3])
def test_padding_changes_nothing(family, attention, size):
    """Tokens that every sequence of a batch forbids, whatever their ids: the answers without them."""
    model = build(family, "token", attention)
    prune(attached(model), 0.4)
    small = pk.compact(model)
    ids = batch(size, 9, padded=False)["input_ids"]  # [size, 9]
    lengths = torch.tensor([9, 4, 1])[:size]
    allowed = (torch.arange(9) < lengths[:, None]).long()
    want = [logits(small, {"input_ids": i[None, :n]})[0] for i, n in zip(ids, lengths, strict=True)]  # [n, labels] each
    for tail in (0, 1, 7):
        padded = torch.cat([ids, ids.flip(1)[:, :tail]], 1)
        mask = torch.cat([allowed, allowed.new_zeros(size, tail)], 1)
        got = logits(small, {"input_ids": padded, "attention_mask": mask})
        for i, n in enumerate(lengths):
            assert difference(got[i, :n], want[i]) <= F32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_of_padding_only(family, monkeypatch):
    """It has finite answers, those of the masked model, and leaves its neighbours alone."""
    model = build(family, "token")
    prune(attached(model), 0.4)
    small = pk.compact(model)
    inputs = batch(3, 9, padded=False)
    inputs["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    alone = logits(small, inputs)
    inputs["attention_mask"][1] = 0
    calls = watch(monkeypatch)
    got = logits(small, inputs)
    assert calls == ["encoder_block"] * LAYERS
    assert got.isfinite().all()
    assert difference(got[::2], alone[::2]) <= F32 and difference(got[1], alone[1]) > 1e-3
    assert difference(got, logits(model, inputs)) <= F32


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_once(family):
    """q, k and v are packed as one and not again each by itself."""
    model = build(family)
    prune(attached(model), 0.3)
    small = pk.compact(model)
    pack_all(small)
    packed = [m for m in small.modules() if isinstance(m, CompactLinear) and m._packed is not None]
    assert len(packed) == 3 * LAYERS
    attentions = [m for m in small.modules() if isinstance(m, CompactAttention)]
    before = [m._packed for m in attentions]
    assert all(before)
    want = logits(small, batch())
    assert [m._packed for m in attentions] == before
    # A weight changed in place is packed again.
    q = next(m for n, m in small.named_modules() if n.endswith(("q_lin", "query")))
    with torch.no_grad():
        q.weight.mul_(-3.0)
    assert difference(logits(small, batch()), want) > 1e-4
    assert attentions[0]._packed is not before[0] and attentions[1]._packed is before[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_mask_for_all_sequences(family):
    """A mask of one's own, [1, 1, tokens, tokens], meets a batch of four."""
    model = build(family)
    prune(attached(model), 0.3)
    ids, keys = batch(padded=False)["input_ids"], torch.ones(1, 1, 9, 9, dtype=torch.bool)
    keys[..., 6:] = False
    inputs = {"input_ids": ids, "attention_mask": keys}
    assert difference(logits(pk.compact(model), inputs), logits(model, inputs)) <= F32


def test_key_masks():
    padding = torch.tensor([[True, True, False], [True, False, False]])
    expanded = padding[:, None, None].expand(2, 1, 3, 3)
    assert key_mask_of(None) == (True, None)
    for repeated in (expanded, expanded.clone(), expanded[:, :, :1]):
        ok, keys = key_mask_of(repeated)
        assert ok and torch.equal(keys, padding)
    for other in (expanded.clone().tril(), expanded.float(), expanded.expand(2, 4, 3, 3), padding):
        assert key_mask_of(other) == (False, None)
    written = expanded.clone()
    assert key_mask_of(written)[0]
    written[0, 0, 1] = False  # the same tensor with other values
    assert not key_mask_of(written)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_compiled_whole(family, share):
    """One graph, no breaks, the same answers."""
    model = build(family)
    prune(attached(model), share)
    small = pk.compact(model)
    inputs = batch()
    want = logits(small, inputs)
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(small, fullgraph=True, backend="aot_eager")(**inputs).logits
    assert difference(got, want) <= F32


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 10_000),
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=10, max_size=10),
    size=st.integers(1, 3),
    length=st.integers(3, 12),
)
def test_compact_equals_masked_for_any_mix_of_shares(family, attention, seed, shares, size, length):
    """Every mask of every layer with a share of its own, heads cut whole and in part."""
    model = build(family, "token", attention, torch.float64, seed=seed)
    pruner = attached(model, seed=seed)
    rng = np.random.default_rng(seed)
    kept = {}
    for (name, mask), share in zip(pruner.masks.items(), shares, strict=True):
        kept[name] = rng.random(mask.logits.numel()) >= share
        if mask.logits.numel() == HIDDEN:
            kept[name] &= np.repeat(rng.random(HEADS) >= share / 2, HEAD_DIM)
    keep_only(pruner, kept)
    check(model, batch(size, length, seed=seed), F64)


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_not_final_and_final_alike(family):
    model = build(family, dtype=torch.float64)
    pruner = attached(model, sparsity=0.4)
    for _ in range(3):
        pruner.step()
    model.eval()
    check(model, batch(), F64)
    pruner.finalize()
    check(model, batch(), F64)


@pytest.mark.parametrize(
    "options", [{"preset": "paper"}, {"targets": ["q", "v"]}, {"targets": ["v"]}, {"targets": ["q"]}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_choices_of_layers(family, options):
    if "targets" in options:
        last = {part: name.rpartition(".")[2] for part, name in names(family).items()}
        options = {"targets": [last[t] for t in options["targets"]]}
    for share in (0.5, 0.9):
        model = build(family, dtype=torch.float64)
        prune(attached(model, **options), share)
        small = check(model, batch(), F64)
        n = names(family)
        assert small.get_submodule(n["up"]).weight.shape == (FFN, HIDDEN)  # a compact layer all the same, whole


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_by_full_name_and_partners_outside_the_targets(family):
    """Only one layer's FFN and keys: partners without adapters are cut as they are."""
    n = names(family, 1)
    model = build(family, dtype=torch.float64)
    pruner = attached(model, targets=[n["up"], n["k"]], sparsity=0.05)
    assert set(pruner.masks) == {n["up"]} and set(pruner.layers) == {n["up"], n["k"]}
    prune(pruner, 0.5)
    small = check(model, batch(), F64)
    kept = int(pruner.masks[n["up"]].kept().sum())
    assert small.get_submodule(n["up"]).weight.shape == (kept, HIDDEN)
    assert small.get_submodule(n["down"]).weight.shape == (HIDDEN, kept)
