"""What rule "stock" keeps: every block alike, and the best such choice, found again by going through all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from prunekern import families
from prunekern.compacting.plan import from_kept
from prunekern.pruning import budget, whole_heads
from tests.helpers import tiny_decoders
from tests.helpers.tiny_decoders import MANY_HEADS
from tests.helpers.tiny_models import FFN

KV_HEADS = MANY_HEADS["num_key_value_heads"]
DECODER = tiny_decoders.build("mistral", **MANY_HEADS)
TABLE = families.of(DECODER).table(DECODER)
COUNTS = tuple(range(1, KV_HEADS + 1))


def scores(seed, table=TABLE):
    """Logits of which kinds, blocks and heads differ in the mean."""
    rng = np.random.default_rng(seed)
    result, of_kind = {}, {kind: 2 * rng.standard_normal() for kind in ("query_key", "value", "ffn", "residual")}
    for carrier, group in table.groups.items():
        result[carrier] = rng.standard_normal(group.count) + of_kind[group.kind]
        if group.head is not None:
            result[carrier] += 2 * rng.standard_normal(int(group.head.max()) + 1)[group.head.numpy()]
    return result


def removed(table, kept, what):
    return from_kept(table, {c: torch.from_numpy(k) for c, k in kept.items()}).sparsity(what)


def best_by_hand(table, logits, share, what, align):
    """(worth lost, share removed) of the best choice: every number of heads with every width, ranked by definition."""
    flat = np.sort(np.concatenate(list(logits.values())))
    cut = next(x for x in flat if removed(table, {c: v > x for c, v in logits.items()}, what) >= share)
    dense = from_kept(table, {})
    total = dense.dense_params() if what == "params" else dense.dense_macs()
    cost = {}
    for c, v in logits.items():
        one = np.ones(v.size, bool)
        one[0] = False
        cost[c] = total * removed(table, {c: one}, what)
    found = []
    for heads in COUNTS:
        widest = None
        for width in range(FFN, 0, -1):
            if width % align and width != FFN:
                continue
            kept, lost = {c: np.ones(v.size, bool) for c, v in logits.items()}, 0.0
            for c, group in table.groups.items():
                if group.kind == "ffn":
                    kept[c][np.argsort(logits[c])[: FFN - width]] = False
                if group.kind == "value":
                    q = next(n for n, g in table.groups.items() if g.lives_by == c)
                    of_head = [
                        sum(cost[n] * (logits[n][table.groups[n].head == h] - cut).sum() for n in (c, q))
                        for h in range(KV_HEADS)
                    ]
                    gone = np.argsort(of_head)[: KV_HEADS - heads]
                    for n in (c, q):
                        kept[n] = ~np.isin(table.groups[n].head.numpy(), gone)
            if removed(table, kept, what) >= share:
                lost = sum(cost[c] * (logits[c] - cut)[~k].sum() for c, k in kept.items())
                widest = (lost, removed(table, kept, what))
                break
        if widest is not None:
            found.append(widest)
    return min(found), cut, cost


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0, 0.8),
    what=st.sampled_from(["params", "macs"]),
    align=st.sampled_from([5, 8, 16, 100]),
)
def test_every_block_alike_and_the_least_is_lost(seed, share, what, align):
    logits = scores(seed)
    try:
        kept = whole_heads.select_stock(TABLE, logits, share, what, align, COUNTS)
    except ValueError:
        assert align == 100 or share > 0.75  # the FFN stays, or one head and a block of 16 are too much
        return
    kept = {c: k.numpy() for c, k in kept.items()}
    counts = {kind: set() for kind in ("query_key", "value", "ffn", "residual")}
    for c, k in kept.items():
        group = TABLE.groups[c]
        counts[group.kind].add(int(k.sum()))
        if group.kind == "ffn" and k.any() and not k.all():
            assert logits[c][k].min() >= logits[c][~k].max() and k.sum() % align == 0
        if group.head is not None:
            by_head = [k[group.head == h] for h in range(KV_HEADS)]
            assert all(h.all() or not h.any() for h in by_head)
            if group.lives_by:  # with the values of their head
                assert np.array_equal(k, np.repeat([kept[group.lives_by][i] for i in range(0, 60, 12)], 6))
    assert all(len(n) == 1 for n in counts.values()) and counts["residual"] == {tiny_decoders.HIDDEN}
    (lost, gone), cut, cost = best_by_hand(TABLE, logits, share, what, align)
    assert removed(TABLE, kept, what) >= share
    got = sum(cost[c] * (logits[c] - cut)[~k].sum() for c, k in kept.items())
    assert got == pytest.approx(lost, rel=1e-9, abs=1e-6) and removed(TABLE, kept, what) == pytest.approx(gone)


@pytest.mark.parametrize("low", ["heads", "ffn"])
def test_what_has_low_logits_goes(low):
    """At a share that either kind can meet alone."""
    logits = scores(0)
    for c, group in TABLE.groups.items():
        logits[c] = np.abs(logits[c]) + (0 if (group.kind == "ffn") == (low == "ffn") else 20)
    kept = whole_heads.select_stock(TABLE, logits, 0.2, "params", 1, COUNTS)
    for c, k in kept.items():
        gone = TABLE.groups[c].kind in (("ffn",) if low == "ffn" else ("query_key", "value"))
        assert bool(k.all()) != gone, c


def test_flat_logits_overshoot_least():
    flat = {c: np.ones(g.count) for c, g in TABLE.groups.items()}
    for share in (0.0, 0.2, 0.5):
        kept = {c: k.numpy() for c, k in whole_heads.select_stock(TABLE, flat, share, "params", 1, COUNTS).items()}
        one = 2 * 3 * tiny_decoders.HIDDEN / from_kept(TABLE, {}).dense_params()  # one FFN channel of both blocks
        assert share <= removed(TABLE, kept, "params") < share + one


def test_most_that_can_go_can_go():
    with pytest.raises(ValueError, match="out of reach of rule 'stock'.* 1 of 5 heads and 8 of 96 FFN channels") as e:
        whole_heads.select_stock(TABLE, scores(0), 0.99, "macs", 8, COUNTS)
    most = float(str(e.value).split("remove is ")[1].split()[0])
    kept = whole_heads.select_stock(TABLE, scores(0), most - 1e-4, "macs", 8, COUNTS)
    assert removed(TABLE, {c: k.numpy() for c, k in kept.items()}, "macs") == pytest.approx(most, abs=1e-4)


@pytest.mark.parametrize("config_class", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_head_counts_are_those_the_config_takes(config_class):
    """Asked of the class itself: a release of transformers that refuses more, or less, shows."""

    def config(kv):
        return config_class(hidden_size=72, head_dim=12, num_attention_heads=2 * kv, num_key_value_heads=kv)

    accepted = []
    for kv in range(1, 13):
        try:
            config(kv)
            accepted.append(kv)
        except Exception as error:
            assert "is not a multiple of the number of attention heads" in str(error)
    assert whole_heads.head_counts(config(12)) == tuple(accepted)
    assert (accepted != list(range(1, 13))) == (config_class is LlamaConfig)


def test_scores_kept_are_the_worth_above_the_cut():
    logits = scores(1)
    worth = whole_heads.worth(TABLE, logits, 0.3, "params")
    above = {c: torch.from_numpy(w > 0) for c, w in worth.items()}
    assert whole_heads.kept_score(TABLE, worth, above) == pytest.approx(1)
    assert removed(TABLE, {c: k.numpy() for c, k in above.items()}, "params") == pytest.approx(0.3, abs=1e-2)
    nothing = {c: torch.zeros_like(k) for c, k in above.items()}
    assert whole_heads.kept_score(TABLE, worth, nothing) == 0
    for share in (0.1, 0.25, 0.5):
        worth = whole_heads.worth(TABLE, logits, share, "params")
        learned = budget.select_global(TABLE, logits, share, "params", 1)
        assert whole_heads.kept_score(TABLE, worth, learned) == pytest.approx(1, abs=0.05)
