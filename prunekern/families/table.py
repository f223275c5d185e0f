"""Channel groups of a model as data: the one table that cost, plan, compaction and uniform pruning derive from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

COSTS = ("params", "macs")  # what a share of a model can be of


@dataclass(frozen=True)
class Layer:
    """One linear of a block: [rows, cols] weight, with or without bias."""

    name: str
    rows: int
    cols: int
    bias: bool


@dataclass(frozen=True)
class Group:
    """All channel groups of one kind in one block.

    Group i is row `rows[i]` (or rows, [count, n]) of the carrier, whose magnitude its mask multiplies; with it fall
    the same entries of `removed_rows` and `removed_cols` in other layers, because their product with zero is zero.
    `head` is the attention head each group belongs to; groups of kind "query_key" also fall when no group of
    `lives_by` is left in their head (no value channel: nothing reads the head).
    """

    kind: str  # "query_key" | "value" | "ffn" | "residual"
    carrier: str
    rows: Tensor  # int64 [count, n]
    removed_rows: Mapping[str, Tensor] = field(default_factory=dict)
    removed_cols: Mapping[str, Tensor] = field(default_factory=dict)
    head: Tensor | None = None  # int64 [count]
    lives_by: str | None = None

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def heads(self) -> Tensor:
        """`head`, of a group of a kind that has one."""
        assert self.head is not None, f"groups of {self.carrier} belong to no head"
        return self.head


def channels(count: int) -> Tensor:
    """int64 [count, 1]: group i is channel i."""
    return torch.arange(count, device="cpu").unsqueeze(1)


@dataclass(frozen=True)
class Table:
    """Layers of every block and the channel groups that govern their rows and columns. ValueError where two do."""

    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]  # by carrier
    # Layers whose rows or columns a group governs: its carrier, and how many of them one channel group takes.
    _rows: dict[str, tuple[str, int]] = field(init=False, repr=False, compare=False)
    _cols: dict[str, tuple[str, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Each side of a layer is governed by at most one group: the expected cost is then a sum of products.
        rows: dict[str, tuple[str, int]] = {}
        cols: dict[str, tuple[str, int]] = {}
        for group in self.groups.values():
            for name, index in {group.carrier: group.rows, **group.removed_rows}.items():
                _refuse_twice("rows", name, rows, group)
                rows[name] = (group.carrier, index.shape[1])
            for name, index in group.removed_cols.items():
                _refuse_twice("columns", name, cols, group)
                cols[name] = (group.carrier, index.shape[1])
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_cols", cols)

    # -- what is kept ------------------------------------------------------------------------------------------

    def settle(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """bool [count] by carrier, after heads without any value channel have taken their query/key groups along."""
        settled = {
            c: kept[c].cpu() if c in kept else torch.ones(g.count, dtype=torch.bool, device="cpu")
            for c, g in self.groups.items()
        }
        for carrier, group in self.groups.items():
            if group.lives_by is not None and group.lives_by in self.groups:
                head, readers = group.heads, self.groups[group.lives_by].heads
                alive = torch.zeros(int(max(head.max(), readers.max())) + 1, dtype=torch.bool, device="cpu")
                alive[readers[settled[group.lives_by]]] = True
                settled[carrier] = settled[carrier] & alive[head]
        return settled

    def indices(self, kept: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Kept rows and columns (sorted int64) of every layer. kept: bool [count] by carrier; absent: all kept."""
        settled = self.settle(kept)
        result = {}
        for name, layer in self.layers.items():
            sides = []
            for size, governed, entry in ((layer.rows, self._rows, "rows"), (layer.cols, self._cols, "cols")):
                alive = torch.ones(size, dtype=torch.bool, device="cpu")
                if name in governed:
                    group = self.groups[governed[name][0]]
                    if entry == "cols":
                        index = group.removed_cols[name]
                    else:
                        index = group.rows if name == group.carrier else group.removed_rows[name]
                    alive[index[~settled[group.carrier]].flatten()] = False
                sides.append(alive.nonzero().flatten())
            result[name] = (sides[0], sides[1])
        return result

    # -- what it costs -----------------------------------------------------------------------------------------

    def cost(self, kept: Mapping[str, np.ndarray], what: str) -> float:
        """Parameters ("params", biases counted) or multiply-adds a token ("macs") of all layers.

        kept: probability of each group to be kept, float [count] by carrier, groups independent; absent: 1. The
        expected value is sum over layers of E[rows] * E[columns]; with probabilities of 0 and 1 it is exact.
        """
        count = {}
        for carrier, group in self.groups.items():
            p = kept.get(carrier)
            if group.lives_by is not None and group.lives_by in kept:
                alive = _head_alive(group, self.groups[group.lives_by], kept[group.lives_by])
                p = alive if p is None else p * alive
            count[carrier] = float(group.count) if p is None else float(p.sum())
        total = 0.0
        for name, layer in self.layers.items():
            rows, cols = float(layer.rows), float(layer.cols)
            if name in self._rows:
                carrier, n = self._rows[name]
                rows = count[carrier] * n
            if name in self._cols:
                carrier, n = self._cols[name]
                cols = count[carrier] * n
            total += rows * cols + (rows if layer.bias and what == "params" else 0.0)
        return total


def _refuse_twice(side: str, name: str, governed: Mapping[str, tuple[str, int]], group: Group) -> None:
    if name in governed:
        raise ValueError(
            f"table: {side} of layer {name!r} must be governed by one group (got those carried by "
            f"{governed[name][0]!r} and by {group.carrier!r})"
        )


def _head_alive(group: Group, reader: Group, kept: np.ndarray) -> np.ndarray:
    """P(a value channel is left) of the head each of `group`'s groups belongs to. kept: as in `cost`, of `reader`."""
    with np.errstate(divide="ignore"):
        gone = np.bincount(reader.heads.numpy(), weights=np.log1p(-kept))
    alive: np.ndarray = -np.expm1(gone)[group.heads.numpy()]
    return alive
