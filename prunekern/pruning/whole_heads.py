"""Rule "stock": the choice of groups that leaves every block the same whole heads and FFN width, which transformers
loads with no prunekern (`prunekern.exporting.stock` writes it).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import families
from ..families import Group, Table
from .budget import Scores, by_kind, removed_share, select_global
from .config import PruneConfig
from .heads_by_layer import select_heads
from .saliency import group_cost


class _Stock:
    """Whole heads and FFN channels of every block, the worst first, and what is kept with so many of each left."""

    def __init__(self, table: Table, scores: Scores, what: str, align: int, heads: Sequence[int]):
        self.table, self.scores, self.what = table, scores, what
        reads = {g.lives_by: c for c, g in table.groups.items() if g.lives_by}  # value carrier -> its query/key carrier
        values, self.ffn = (_one_a_block(table, scores, kind) for kind in ("value", "ffn"))
        # Heads go with their queries and keys or not at all.
        self.values = {v: reads[v] for v in values} if set(values) <= set(reads) else {}
        self.dense_heads, self.channels = max(heads), table.groups[self.ffn[0]].count if self.ffn else 0
        self.heads = sorted(heads, reverse=True) if self.values else [self.dense_heads]
        widths = range((self.channels - 1) // align * align, 0, -align)
        self.widths = [self.channels, *widths]
        self.by_head = {v: self._of_heads(v) + self._of_heads(q) for v, q in self.values.items()}
        self.order = {c: np.argsort(s, kind="stable") for c, s in self.by_head.items()}
        self.order |= {c: np.argsort(scores[c], kind="stable") for c in self.ffn}

    def _of_heads(self, carrier: str) -> np.ndarray:
        """Sums of the scores of a head's groups; 0 where they have none. float64 [heads]."""
        group = self.table.groups[carrier]
        score = self.scores.get(carrier, np.zeros(group.count))
        return np.bincount(_heads_of(group).numpy(), weights=score, minlength=self.dense_heads)

    def kept(self, heads: int, width: int) -> dict[str, np.ndarray]:
        kept = {c: np.ones(s.size) for c, s in self.scores.items()}
        for value, query in self.values.items():
            alive = np.ones(self.dense_heads)
            alive[self.order[value][: self.dense_heads - heads]] = 0.0
            for carrier in {value, query} & kept.keys():
                kept[carrier] = alive[_heads_of(self.table.groups[carrier]).numpy()]
        for carrier in self.ffn:
            kept[carrier][self.order[carrier][: self.channels - width]] = 0.0
        return kept

    def share(self, heads: int, width: int) -> float:
        return removed_share(self.table, self.kept(heads, width), self.what)

    def widest(self, heads: int, share: float) -> int | None:
        """The most FFN channels with which `share` is gone; None where even the fewest are too many."""
        low, high = 0, len(self.widths)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share(heads, self.widths[middle]) >= share else (middle + 1, high)
        return self.widths[low] if low < len(self.widths) else None

    def lost(self, heads: int, width: int) -> float:
        """Sum of the scores of what is gone."""
        lost = sum(float(s[self.order[c][: self.dense_heads - heads]].sum()) for c, s in self.by_head.items())
        return lost + sum(float(self.scores[c][self.order[c][: self.channels - width]].sum()) for c in self.ffn)


def _heads_of(group: Group) -> Tensor:
    """The head of each group; those of attention have one."""
    assert group.head is not None, group.carrier
    return group.head


def _one_a_block(table: Table, carriers: Iterable[str], kind: str) -> list[str]:
    """Carriers of that kind; none where a block's is not among `carriers`: it would keep more than the others."""
    own = [c for c, g in table.groups.items() if g.kind == kind]
    return own if set(own) <= set(carriers) else []


def worth(table: Table, logits: Scores, share: float, what: str) -> dict[str, np.ndarray]:
    """What each group is worth where `share` is to go, float64 [groups] by carrier.

    Its cost times its logit over the cut, the lowest logit at which removing it and all below removes the share. A
    logit speaks of a unit of cost (it starts from saliency so); at the cut a group is as well kept as gone.
    """
    levels = np.unique(np.concatenate(list(logits.values())))
    low, high = 0, levels.size - 1
    while low < high:
        middle = (low + high) // 2
        kept = {c: (v > levels[middle]).astype(float) for c, v in logits.items()}
        low, high = (low, middle) if removed_share(table, kept, what) >= share else (middle + 1, high)
    return {c: group_cost(table, c, what) * (v - levels[low]) for c, v in logits.items()}


def kept_score(table: Table, worths: Scores, kept: Mapping[str, Tensor]) -> float:
    """Worth that is kept, of the most there is: 1 where just the groups above the cut are kept; 0 for flat logits."""
    settled = table.settle(kept)
    most = sum(float(np.maximum(w, 0).sum()) for w in worths.values())
    return sum(float(w[settled[c].numpy()].sum()) for c, w in worths.items()) / most if most > 0 else 0.0


def select_stock(
    table: Table, logits: Scores, share: float, what: str, align: int, heads: Sequence[int]
) -> dict[str, Tensor]:
    """Groups to keep, bool by carrier: as many whole heads, and FFN channels, in every block, and all else.

    That is what the configs of transformers can say: one number of heads of one width, one FFN width. Rows that write
    to the residual stay, and so do all channels of a kept head. `heads`: how many (key/value) heads may be left, the
    dense number among them. The FFN's width is a multiple of `align`, or the dense one.

    Within a block the FFN channels with the lowest logits go, and the heads with the lowest sums of `worth` over
    their value and query/key channels. All heads cost the same, so the sum ranks as a mean logit would in which every
    channel counts as its parameters do; the sum is also what heads and FFN channels can be compared by. How many of
    each: for every number of heads the widest FFN that meets the share is found, and of these pairs the one that loses
    the least worth is taken; where they tie, as with flat logits, the one that removes least.

    ValueError where the share cannot be met so, with the most that can.
    """
    choice = _Stock(table, worth(table, logits, share, what), what, align, heads)
    fewest, narrowest = choice.heads[-1], choice.widths[-1]
    most = choice.share(fewest, narrowest)
    if share > most:
        raise ValueError(
            f"finalize: sparsity {share} is out of reach of rule 'stock', which leaves as many whole heads and FFN "
            f"channels in every block and nothing else gone; the most it can remove is {most:.4f} of the block {what}: "
            f"{_least(fewest, choice.dense_heads, choice.values, 'heads')} and "
            f"{_least(narrowest, choice.channels, choice.ffn, 'FFN channels')} must stay"
        )
    pairs = [(h, w) for h in choice.heads if (w := choice.widest(h, share)) is not None]
    best = min(pairs, key=lambda pair: (choice.lost(*pair), choice.share(*pair)))
    return {c: torch.from_numpy(k > 0) for c, k in choice.kept(*best).items()}


def _least(least: int, dense: int, masked: Collection[str], what: str) -> str:
    if not masked:
        return f"all {what} (their masks are not in every block)"
    return f"{least} of {dense} {what}"


def head_counts(config: Any) -> tuple[int, ...]:
    """How many heads (of decoders: key/value heads) a stock config of this kind may have, the dense number last.

    ValueError for the config of an architecture without a family.
    """
    family = families.of_type(config.model_type)
    if family is None:
        raise ValueError(f"head_counts: no family has model type {config.model_type!r}")
    return family.stock(config).head_counts


def choose(
    table: Table, logits: Scores, config: PruneConfig, head_counts: Sequence[int], rule: str = "stock"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(groups that rule "stock" or "heads" keeps, bool by carrier; what it gives up against rule "learned"), by these
    logits.

    head_counts: as `StockConfig` has them; of rule "stock". The second is {"kept_score": {rule: score}, "given_up":
    their difference, "by_kind": {rule: {kind: [kept, of]}}}. A score is the worth of what is kept (`worth`), of the
    most there is: 1 where just the groups that the logits rank above the cut are kept (the learned rule, but for
    alignment and what it gives back); below 0 where what is kept is worth less than nothing at all.
    """
    target = (config.sparsity, config.cost)
    worths = worth(table, logits, *target)
    kept = {
        "learned": select_global(table, logits, *target, config.align),
        rule: select_stock(table, logits, *target, config.align, head_counts)
        if rule == "stock"
        else select_heads(table, worths, *target, config.align),
    }
    score = {name: kept_score(table, worths, k) for name, k in kept.items()}
    return kept[rule], {
        "kept_score": score,
        "given_up": score["learned"] - score[rule],
        "by_kind": {name: by_kind(table, table.settle(k)) for name, k in kept.items()},
    }


def check_reachable(
    table: Table, groups: Mapping[str, int], config: PruneConfig, head_counts: Sequence[int], rule: str = "stock"
) -> None:
    """ValueError where rule "stock" or "heads" cannot remove `config.sparsity`, whatever the logits. groups: how many,
    by carrier of a mask.
    """
    flat = {carrier: np.zeros(count) for carrier, count in groups.items()}
    if flat and rule == "stock":
        select_stock(table, flat, config.sparsity, config.cost, config.align, head_counts)
    elif flat:
        select_heads(table, flat, config.sparsity, config.cost, config.align)
