"""Which layers are held in more bits: as few bytes as do, for a loss that is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..ops.packing import WEIGHTS

# Bytes of a weight: a step of int4 is for 32 of them.
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5625}


def by_decibels(units: Iterable[Sequence[str]], kinds: Sequence[str], db: Mapping[str, Mapping[str, float]],
                least: float) -> dict[str, str]:  # fmt: skip
    """The kind of each layer: the first of `kinds` (the fewest bits first) in which all layers of its unit have `least`
    decibels, fp32 where none does. units: names of layers that are held alike. db: by layer and kind.
    """
    found = {}
    for unit in units:
        kind = next((kind for kind in kinds if all(db[name][kind] >= least for name in unit)), "fp32")
        found.update(dict.fromkeys(unit, kind))
    return found


def by_cost(units: Sequence[Sequence[str]], kinds: Sequence[str], costs: Mapping[str, Mapping[str, float]],
            sizes: Mapping[str, int], most: float) -> dict[str, str]:  # fmt: skip
    """The kind of each layer, for costs of at most `most` together: beginning with the first of `kinds`, the step that
    buys most for a byte is taken until they are; then what turned out to be needless is taken back. No more than fp32
    can be had.

    units, kinds: as of `by_decibels`. costs: by layer and kind, in nats; of none, 0. sizes: weights of a layer.
    """
    kinds = (*kinds, "fp32")
    names = {number: tuple(unit) for number, unit in enumerate(units)}

    def cost(unit: int, kind: str) -> float:
        return sum(costs[name].get(kind, 0.0) for name in names[unit])

    def size(unit: int, kind: str) -> float:
        return sum(sizes[name] for name in names[unit]) * BYTES[kind]

    held = dict.fromkeys(names, kinds[0])
    spent = {unit: cost(unit, kinds[0]) for unit in names}
    taken: list[tuple[int, str]] = []
    while sum(spent.values()) > most:
        steps = [
            ((spent[unit] - cost(unit, kind)) / max(size(unit, kind) - size(unit, held[unit]), 1.0), unit, kind)
            for unit in names
            for kind in kinds[kinds.index(held[unit]) + 1 :]
        ]
        gain, unit, kind = max(steps, default=(0.0, -1, ""), key=lambda step: step[0])
        if gain <= 0.0:
            break
        taken.append((unit, held[unit]))
        held[unit], spent[unit] = kind, cost(unit, kind)
    for unit, kind in taken:
        before = cost(unit, kind)
        if WEIGHTS.index(kind) > WEIGHTS.index(held[unit]) and sum(spent.values()) - spent[unit] + before <= most:
            held[unit], spent[unit] = kind, before
    return {name: held[unit] for unit in names for name in names[unit]}
