"""Rule "heads": whole heads and FFN channels, as many in each block as its logits say, and nothing else gone. Between
rule "learned", whose heads have any width, and rule "stock", whose blocks are all alike: engines that take a number of
heads and an FFN width for each layer run what it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..families import Table
from .budget import Scores, removed_share
from .saliency import group_cost

_NEAR = 8  # heads more and fewer that are tried


@dataclass(frozen=True, eq=False)
class _Unit:
    """What goes as one: a head with its queries, keys and values, or FFN channels of one block."""

    of: str  # the carrier of the head's values, or of the FFN
    groups: Mapping[str, np.ndarray]  # indices of groups by carrier
    worth: float
    cost: float
    share: float  # of its kind in the block that is gone with it
    depth: int = 0  # of FFN channels: its place in the order they go, from 1; of a head 0


def select_heads(table: Table, worths: Scores, share: float, what: str, align: int) -> dict[str, Tensor]:
    """Groups to keep, bool by carrier: whole (key/value) heads and FFN channels go, block by block, and nothing else.

    worths: float64 [groups] by carrier, what each group is worth, as `whole_heads.worth` has it. The units with the
    least worth a cost go first until `share` is removed: a head with all its queries, keys and values, or the lowest
    FFN channels of a block, so many that a multiple of `align` is left. Heads are dear: up to eight more or fewer, and
    FFN channels for them, are taken where that loses less. What the share does not need then is given back, the
    worthiest first. A block keeps its best head and its best `align` channels: engines skip what has none, biases and
    residuals included. Heads of a block whose values have no masks stay, and so does an FFN without.

    ValueError where the share cannot be met so, with the most that can.
    """
    units = _units(table, worths, what, align)
    most = removed_share(table, _kept(worths, units), what)
    if share > most:
        raise ValueError(
            f"finalize: sparsity {share} is out of reach of rule 'heads', which leaves a head and {align} FFN channels "
            f"in every block, and all rows of the residual; the most it can remove is {most:.4f} of the block {what}"
        )
    gone = _give_back(table, worths, _least_lost(table, worths, units, share, what), share, what)
    return {c: torch.from_numpy(k > 0) for c, k in _kept(worths, gone).items()}


def _least_lost(table: Table, worths: Scores, units: list[_Unit], share: float, what: str) -> list[_Unit]:
    """What goes so that `share` does: the first of `units`, or, as heads are dear, some heads more or fewer and FFN
    channels for them, where that loses less.
    """

    def fewest(always: list[_Unit], then: list[_Unit]) -> list[_Unit] | None:
        low, high = 0, len(then) + 1
        while low < high:
            middle = (low + high) // 2
            enough = removed_share(table, _kept(worths, always + then[:middle]), what) >= share
            low, high = (low, middle) if enough else (middle + 1, high)
        return always + then[:low] if low <= len(then) else None

    first = fewest([], units)
    assert first is not None
    heads, channels = [u for u in units if not u.depth], [u for u in units if u.depth]
    count = sum(not unit.depth for unit in first)
    some = range(max(0, count - _NEAR), min(len(heads), count + _NEAR) + 1)
    found = [choice for n in some if (choice := fewest(heads[:n], channels)) is not None]
    return min((first, *found), key=lambda choice: sum(unit.worth for unit in choice))


def _give_back(table: Table, worths: Scores, gone: list[_Unit], share: float, what: str) -> list[_Unit]:
    """Without those that `share` does not need. Of an FFN only the one that went last may come back: otherwise lower
    channels would stay than those that are gone.
    """
    total = table.cost({}, what)
    slack = total * (removed_share(table, _kept(worths, gone), what) - share)
    last = {unit.of: unit.depth for unit in gone}  # they stand in the order they went
    for unit in sorted(gone, key=lambda unit: (-unit.worth, -unit.depth)):
        is_next = unit.depth == 0 or last[unit.of] == unit.depth
        if unit.cost <= slack and is_next:
            less = [other for other in gone if other is not unit]
            removed = removed_share(table, _kept(worths, less), what)
            if removed >= share:
                gone, slack = less, total * (removed - share)
                last[unit.of] = unit.depth - 1
    return gone


def _kept(worths: Scores, gone: list[_Unit]) -> dict[str, np.ndarray]:
    kept = {c: np.ones(w.size) for c, w in worths.items()}
    for unit in gone:
        for carrier, groups in unit.groups.items():
            kept[carrier][groups] = 0.0
    return kept


def _units(table: Table, worths: Scores, what: str, align: int) -> list[_Unit]:
    """All that may go, the least worth a cost first."""
    cost = {c: group_cost(table, c, what) for c in table.groups}
    reads = {group.lives_by: c for c, group in table.groups.items() if group.lives_by}
    units: list[_Unit] = []
    for carrier in worths:
        group = table.groups[carrier]
        if group.kind == "value" and carrier in reads:
            units += _heads(table, carrier, reads[carrier], worths, cost)
        elif group.kind == "ffn":
            units += _widths(carrier, worths[carrier], cost[carrier], align)
    # Worth a cost ascends in an FFN's units already: none goes before one that must. Ties prune all blocks alike.
    return sorted(units, key=lambda unit: (unit.worth / unit.cost, unit.share))


def _heads(table: Table, value: str, query: str, worths: Scores, cost: Mapping[str, float]) -> list[_Unit]:
    """Of one block, all but the best."""
    found: list[tuple[float, dict[str, np.ndarray]]] = []
    of_head = {c: table.groups[c].head for c in (value, query)}
    heads = of_head[value]
    assert heads is not None, value
    for head in torch.unique(heads).tolist():
        groups = {c: (of == head).nonzero().flatten().numpy() for c, of in of_head.items() if of is not None}
        found.append((sum(float(worths[c][at].sum()) for c, at in groups.items() if c in worths), groups))
    found = sorted(found, key=lambda head: head[0])
    return [
        # Queries without a mask fall with the values.
        _Unit(
            value,
            {c: at for c, at in groups.items() if c in worths},
            worth,
            sum(cost[c] * at.size for c, at in groups.items()),
            i / len(found),
        )
        for i, (worth, groups) in enumerate(found[:-1], 1)
    ]


def _widths(carrier: str, worth: np.ndarray, cost: float, align: int) -> list[_Unit]:
    """The lowest channels, so many at a time that multiples of `align` are left; `align` of them at least."""
    ascending, channels = np.argsort(worth, kind="stable"), worth.size
    left = [channels, *range((channels - 1) // align * align, 0, -align)]
    parts = [ascending[channels - wide : channels - narrow] for wide, narrow in zip(left, left[1:], strict=False)]
    return [
        _Unit(carrier, {carrier: part}, float(worth[part].sum()), cost * part.size, depth / len(left), depth)
        for depth, part in enumerate(parts, 1)
    ]
