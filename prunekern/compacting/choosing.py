"""Which layers are held in more bits: as few bytes as do, for a loss that is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

WIDE = "int8, x in fp32"  # weights as in int8, x not rounded
# What a weight costs: its bytes, a step of int4 for 32 of them. WIDE has those of int8, and its time at one row (31
# us beside 37, [1400, 576], AVX-512 VNNI). The rest is for many rows, where it takes as long as fp32.
BYTES = {"fp32": 4.0, "bf16": 2.0, WIDE: 1.25, "int8": 1.0, "int4": 0.5625}
_ORDER = tuple(BYTES)  # the most careful first


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

    units, kinds: as of `by_decibels`. costs: by layer and kind, in nats; a layer with none, as one that read nothing,
    costs nothing. A kind that some layer of a unit has no costs in is not for that unit. sizes: weights of a layer.
    """
    names = {number: tuple(unit) for number, unit in enumerate(units)}

    def cost(unit: int, kind: str) -> float:
        return sum(costs[name].get(kind, 0.0) for name in names[unit])

    def size(unit: int, kind: str) -> float:
        return sum(sizes[name] for name in names[unit]) * BYTES[kind]

    def more(unit: int) -> list[str]:
        careful = _ORDER[: _ORDER.index(held[unit])]
        return [kind for kind in careful if kind == "fp32" or all(kind in costs[name] for name in names[unit])]

    held = dict.fromkeys(names, kinds[0])
    spent = {unit: cost(unit, kinds[0]) for unit in names}
    taken: list[tuple[int, str]] = []
    while sum(spent.values()) > most:
        steps = [
            ((spent[unit] - cost(unit, kind)) / max(size(unit, kind) - size(unit, held[unit]), 1.0), unit, kind)
            for unit in names
            for kind in more(unit)
        ]
        gain, unit, kind = max(steps, default=(0.0, -1, ""), key=lambda step: step[0])
        if gain <= 0.0:
            break
        taken.append((unit, held[unit]))
        held[unit], spent[unit] = kind, cost(unit, kind)
    for unit, kind in taken:
        before = cost(unit, kind)
        if _ORDER.index(kind) > _ORDER.index(held[unit]) and sum(spent.values()) - spent[unit] + before <= most:
            held[unit], spent[unit] = kind, before
    return {name: held[unit] for unit in names for name in names[unit]}
