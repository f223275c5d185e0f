"""What rule "heads" keeps: whole heads and multiples of FFN channels, block by block, the least worth a cost gone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekern as pk
from prunekern.compacting.plan import from_kept
from prunekern.pruning import budget, whole_heads
from prunekern.pruning.heads_by_layer import select_heads
from tests.helpers import tiny_decoders
from tests.helpers.tiny_models import FFN, attached, build, difference
from tests.pruning.test_whole_heads import KV_HEADS, TABLE, removed, scores


def heads_of(kept, carrier):
    """Whether each head of a block is left. Every head is whole."""
    head = TABLE.groups[carrier].head.numpy()
    by_head = [kept[carrier][head == h] for h in np.unique(head)]
    assert all(h.all() or not h.any() for h in by_head)
    return [bool(h[0]) for h in by_head]


def units_by_hand(logits, worths, what, align):
    """(worth a cost, {carrier: groups}) of all that may go, from the plan's own count of what is gone."""
    dense = from_kept(TABLE, {})
    total = dense.dense_params() if what == "params" else dense.dense_macs()

    def cost(groups):
        kept = {c: np.ones(v.size, bool) for c, v in logits.items()}
        for c, at in groups.items():
            kept[c][at] = False
        return total * removed(TABLE, kept, what)

    found = []
    for c, group in TABLE.groups.items():
        if group.kind == "ffn":
            order = np.argsort(logits[c], kind="stable")
            wide = FFN
            for narrow in range((FFN - 1) // align * align, 0, -align):
                found.append({c: order[FFN - wide : FFN - narrow]})
                wide = narrow
        if group.kind == "value":
            q = next(n for n, g in TABLE.groups.items() if g.lives_by == c)
            own = [{n: np.flatnonzero(TABLE.groups[n].head.numpy() == h) for n in (c, q)} for h in range(KV_HEADS)]
            worth = [sum(worths[n][at].sum() for n, at in unit.items()) for unit in own]
            found += [unit for i, unit in enumerate(own) if i != int(np.argmax(worth))]
    worth = [sum(worths[n][at].sum() for n, at in unit.items()) for unit in found]
    return [(w / cost(unit), unit) for w, unit in zip(worth, found, strict=True)]


def best_by_hand(of_kind, worths, share, what):
    """Worth lost by the best choice: every number of heads, each with the fewest FFN units that meet the share."""
    best = np.inf
    for count in range(len(of_kind[0]) + 1):
        for channels in range(len(of_kind[1]) + 1):
            gone = [unit for _, unit in of_kind[0][:count] + of_kind[1][:channels]]
            kept = {c: np.ones(v.size, bool) for c, v in worths.items()}
            for unit in gone:
                for c, at in unit.items():
                    kept[c][at] = False
            if removed(TABLE, kept, what) >= share:
                best = min(best, sum(worths[c][at].sum() for unit in gone for c, at in unit.items()))
                break
    return best


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.floats(0, 0.7),
    what=st.sampled_from(["params", "macs"]),
    align=st.sampled_from([5, 8, 16, 100]),
)
def test_the_least_worth_goes_and_no_more_than_is_needed(seed, share, what, align):
    logits = scores(seed)
    worths = whole_heads.worth(TABLE, logits, share, what)
    try:
        kept = {c: k.numpy() for c, k in select_heads(TABLE, worths, share, what, align).items()}
    except ValueError:
        assert align == 100 or share > 0.6
        return
    assert removed(TABLE, kept, what) >= share
    for c, group in TABLE.groups.items():
        if group.kind == "residual":
            assert kept[c].all()
        if group.kind == "value":
            q = next(n for n, g in TABLE.groups.items() if g.lives_by == c)
            assert heads_of(kept, c) == heads_of(kept, q) and any(heads_of(kept, c))
        if group.kind == "ffn":
            left = kept[c].sum()
            assert left == FFN or (left % align == 0 and left >= align)
            assert kept[c].all() or logits[c][kept[c]].min() >= logits[c][~kept[c]].max()
    # Units of a kind go by their worth a cost, unless they were given back; no other numbers of both lose less; and
    # what is gone is needed: without any one unit of it that could come back, the share is missed.
    units = units_by_hand(logits, worths, what, align)
    gone = [u for u in units if all(not kept[c][at].any() for c, at in u[1].items())]
    lost = sum(worths[c][at].sum() for _, unit in gone for c, at in unit.items())
    of_kind = [sorted((u for u in units if len(u[1]) == n), key=lambda u: u[0]) for n in (2, 1)]
    assert lost <= best_by_hand(of_kind, worths, share, what) + 1e-6
    for _, unit in gone:
        c = next(iter(unit))
        if TABLE.groups[c].kind == "ffn" and logits[c][unit[c]].max() < logits[c][~kept[c]].max():
            continue  # only the last of a block may come back
        more = {c: k.copy() for c, k in kept.items()}
        for c, at in unit.items():
            more[c][at] = True
        assert removed(TABLE, more, what) < share


def test_flat_logits_prune_all_blocks_alike():
    flat = {c: np.ones(g.count) for c, g in TABLE.groups.items()}
    worths = whole_heads.worth(TABLE, flat, 0.4, "params")
    kept = {c: k.numpy() for c, k in select_heads(TABLE, worths, 0.4, "params", 8).items()}
    left = [int(kept[c].sum()) for c, g in TABLE.groups.items() if g.kind == "ffn"]
    heads = [sum(heads_of(kept, c)) for c, g in TABLE.groups.items() if g.kind == "value"]
    assert max(left) - min(left) <= 8 and max(heads) - min(heads) <= 1 and min(heads) < KV_HEADS and min(left) < FFN


def test_between_learned_and_stock():
    """On logits whose blocks differ, a number for each block gives up less than one for all."""
    logits = scores(3)
    config = pk.PruneConfig(sparsity=0.4)
    counts = tuple(range(1, KV_HEADS + 1))
    up = {r: whole_heads.choose(TABLE, logits, config, counts, r)[1]["given_up"] for r in ("heads", "stock")}
    assert 0 < up["heads"] < up["stock"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_masked_equals_compact(family):
    model = tiny_decoders.build("llama") if family == "llama" else build(family, "sequence")
    pruner = attached(model, sparsity=0.3, align=8)
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for mask in pruner.masks.values():
            mask.logits.copy_(torch.from_numpy(rng.standard_normal(mask.logits.shape)))
    report = pruner.finalize("heads")
    assert report["sparsity"] >= 0.3 and report["given_up"] > 0
    model.eval()
    small = pk.compact(model)
    ids = torch.randint(5, 30, (2, 9))
    with torch.no_grad():
        assert difference(small(ids).logits, model(ids).logits) < 1e-4


def test_out_of_reach():
    pruner = attached(tiny_decoders.build("llama"), sparsity=0.97)
    with pytest.raises(ValueError, match="out of reach of rule 'heads'.*the most it can remove is 0"):
        pruner.check_rule("heads")
    flat = {c: np.zeros(g.count) for c, g in TABLE.groups.items()}
    with pytest.raises(ValueError, match="leaves a head and 8 FFN channels") as error:
        select_heads(TABLE, flat, 0.99, "macs", 8)
    most = float(str(error.value).split("remove is ")[1].split()[0])
    kept = select_heads(TABLE, flat, most - 1e-4, "macs", 8)
    assert budget.removed_share(TABLE, {c: k.double().numpy() for c, k in kept.items()}, "macs") >= most - 1e-4
