"""Mask logits and cost: the threshold that meets a target in expectation, the choice that meets it exactly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..families import Table

Scores = Mapping[str, np.ndarray]  # carrier -> float64 [groups]


def dense_cost(table: Table, what: str) -> float:
    return table.cost({}, what)


def removed_share(table: Table, kept: Scores, what: str) -> float:
    """Share of the dense cost that is gone, expected over independent groups kept with probability `kept`."""
    return 1.0 - table.cost(kept, what) / dense_cost(table, what)


def most_removable(table: Table, carriers: Iterable[str], what: str) -> float:
    """Share that is gone when every group of these carriers is."""
    return removed_share(table, {c: np.zeros(table.groups[c].count) for c in carriers}, what)


def by_kind(table: Table, kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """[groups kept, of how many] by kind of group. kept: bool by carrier, settled (`Table.settle`)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for carrier, alive in kept.items():
        count = counts[table.groups[carrier].kind]
        count[0] += int(alive.sum())
        count[1] += alive.numel()
    return dict(counts)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def solve_threshold(table: Table, logits: Scores, share: float, what: str, tolerance: float = 1e-6) -> float:
    """The global threshold t at which keeping each group with probability sigmoid(logit - t) removes `share`.

    The removed share rises with t from 0 to `most_removable`, so a bracketing root search cannot fail; Illinois'
    variant of regula falsi needs about 8 evaluations where bisection needs 30.
    """
    low = min(float(v.min()) for v in logits.values()) - 30.0
    high = max(float(v.max()) for v in logits.values()) + 30.0

    def excess(t: float) -> float:
        return removed_share(table, {c: sigmoid(v - t) for c, v in logits.items()}, what) - share

    # Start from a bracket around where a flat table would stand: the far ends are all but flat.
    f_low, f_high = excess(low), excess(high)
    if f_low >= 0:
        return low
    if f_high <= 0:
        return high
    for near in (float(np.mean([v.mean() for v in logits.values()])) + d for d in (-4.0, 0.0, 4.0)):
        if low < near < high:
            f = excess(near)
            if f < 0:
                low, f_low = near, f
            else:
                high, f_high = near, f
                break
    side = 0
    for _ in range(100):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        f = excess(middle)
        if abs(f) <= tolerance or high - low < 1e-9:
            return middle
        if f < 0:
            low, f_low = middle, f
            f_high *= 0.5 if side < 0 else 1.0
            side = -1
        else:
            high, f_high = middle, f
            f_low *= 0.5 if side > 0 else 1.0
            side = 1
    return middle


class _Removal:
    """How many alignment blocks each mask has lost, lowest scores first, and what that costs."""

    def __init__(self, table: Table, order: Mapping[str, np.ndarray], align: int, what: str):
        self.table, self.order, self.align, self.what = table, order, align, what
        self.blocks = {c: 0 for c in order}
        self.dense = dense_cost(table, what)

    def removed(self, carrier: str, blocks: int) -> int:
        """Groups gone after `blocks` blocks. The first takes the remainder, so that multiples of align are left."""
        n = self.order[carrier].size
        return min(n, max(0, blocks * self.align - (-n % self.align)))

    def limit(self, carrier: str) -> int:
        return -(-self.order[carrier].size // self.align)

    def kept(self) -> dict[str, np.ndarray]:
        kept = {}
        for carrier, order in self.order.items():
            kept[carrier] = np.ones(order.size)
            kept[carrier][order[: self.removed(carrier, self.blocks[carrier])]] = 0.0
        return kept

    def share(self) -> float:
        return 1.0 - self.table.cost(self.kept(), self.what) / self.dense

    def result(self) -> dict[str, Tensor]:
        return {c: torch.from_numpy(k > 0) for c, k in self.kept().items()}


def select_global(table: Table, scores: Scores, share: float, what: str, align: int) -> dict[str, Tensor]:
    """Groups to keep, bool by carrier: the lowest scores of all masks go first until `share` is removed.

    Each mask loses whole blocks of `align` groups, ranked by their mean score; ties go by how deep in its mask a
    block lies, so that flat scores prune every mask alike. The share is met from above, and no block whose mask
    would stay aligned can be given back.
    """
    order = {c: np.argsort(v, kind="stable") for c, v in scores.items()}
    state = _Removal(table, order, align, what)
    carriers, keys = [], []
    for c, v in scores.items():
        ascending = v[order[c]]
        for block in range(state.limit(c)):
            first, last = state.removed(c, block), state.removed(c, block + 1)
            keys.append((float(ascending[first:last].mean()), (block + 1) / state.limit(c)))
            carriers.append(c)
    # Within a mask the keys ascend already, so a stable sort never takes a later block before an earlier one.
    ranked = [carriers[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]
    low, high = 0, len(ranked)  # fewest blocks whose removal reaches the share
    while low < high:
        middle = (low + high) // 2
        _take(state, ranked[:middle])
        low, high = (low, middle) if state.share() >= share else (middle + 1, high)
    _take(state, ranked[:low])
    # The last block may have taken a whole head along, and met the target by far: give back what it does not need,
    # highest scores first. A mask whose next block is needed now is needed to the end, as the share only falls.
    needed: set[str] = set()
    for carrier in reversed(ranked[:low]):
        if carrier not in needed:
            state.blocks[carrier] -= 1
            if state.share() < share:
                state.blocks[carrier] += 1
                needed.add(carrier)
    return state.result()


def _take(state: _Removal, ranked: list[str]) -> None:
    state.blocks = {c: 0 for c in state.blocks}
    for carrier in ranked:
        state.blocks[carrier] += 1


def select_uniform(table: Table, scores: Scores, share: float, what: str, align: int) -> dict[str, Tensor]:
    """Groups to keep, bool by carrier: the same fraction of every mask goes, lowest scores first.

    Masks round their count at staggered points, so that one block more is gone at a time and the share is met to
    within one alignment step.
    """
    order = {c: np.argsort(v, kind="stable") for c, v in scores.items()}
    state = _Removal(table, order, align, what)
    steps = []
    for i, c in enumerate(scores):
        stagger = (i + 0.5) / len(scores)
        steps += [((block + stagger) / state.limit(c), c) for block in range(state.limit(c))]
    ranked = [c for _, c in sorted(steps, key=lambda s: s[0])]
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        _take(state, ranked[:middle])
        low, high = (low, middle) if state.share() >= share else (middle + 1, high)
    _take(state, ranked[:low])
    return state.result()
