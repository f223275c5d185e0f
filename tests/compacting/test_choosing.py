"""Which kinds are chosen: by decibels, and by what they cost together."""

import itertools

import pytest
import torch

from prunekern.compacting.choosing import BYTES, by_cost, by_decibels

KINDS = ("int4", "int8", "bf16")
UNITS = [("q", "k"), ("o",), ("up", "down")]
NAMES = [name for unit in UNITS for name in unit]


def test_a_unit_takes_what_its_worst_layer_needs():
    db = {name: {"int4": 20.0, "int8": 40.0, "bf16": 50.0} for name in NAMES}
    db["k"]["int4"], db["down"] = 19.9, {"int4": 1.0, "int8": 2.0, "bf16": 3.0}
    assert by_decibels(UNITS, KINDS, db, 20.0) == {
        "q": "int8", "k": "int8", "o": "int4", "up": "fp32", "down": "fp32"
    }  # fmt: skip


def found(seed):
    random = torch.Generator().manual_seed(seed)
    costs = {}
    for name in NAMES:
        high = float(torch.rand(1, generator=random)) ** 4
        costs[name] = {"int4": high, "int8": high / 200, "bf16": high / 1000}
    sizes = {name: int(torch.randint(1, 5, (1,), generator=random)) * 1000 for name in NAMES}
    return costs, sizes


def spent(kinds, costs, sizes):
    """(costs, bytes) of all."""
    return sum(costs[n].get(k, 0.0) for n, k in kinds.items()), sum(sizes[n] * BYTES[k] for n, k in kinds.items())


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_costs_stay_below_what_is_allowed_and_bytes_near_the_fewest(seed, share):
    """Against all ways of choosing. Greed may take one unit too many, of at most 8,000 weights, in int8."""
    costs, sizes = found(seed)
    most = share * sum(c["int4"] for c in costs.values())
    kinds = by_cost(UNITS, KINDS, costs, sizes, most)
    cost, size = spent(kinds, costs, sizes)
    assert cost <= most and all(len({kinds[name] for name in unit}) == 1 for unit in UNITS)
    ways = (
        {name: kind for unit, kind in zip(UNITS, way, strict=True) for name in unit}
        for way in itertools.product((*KINDS, "fp32"), repeat=len(UNITS))
    )
    fewest = min(s for c, s in (spent(way, costs, sizes) for way in ways) if c <= most)
    assert size <= fewest + 8000 * (BYTES["int8"] - BYTES["int4"])


def test_a_costly_layer_alone_is_held_in_more_bits():
    costs = {name: {"int4": 0.001, "int8": 0.00001, "bf16": 0.0} for name in NAMES}
    costs["o"] = {"int4": 0.5, "int8": 0.001, "bf16": 0.0}
    kinds = by_cost(UNITS, KINDS, costs, dict.fromkeys(NAMES, 100), 0.02)
    assert kinds == dict.fromkeys(NAMES, "int4") | {"o": "int8"}


def test_what_a_later_step_made_needless_is_taken_back():
    """First the small unit, which buys most for a byte; then the large one, which alone would have done."""
    costs = {"a": {"int8": 0.01, "bf16": 0.0}, "b": {"int8": 1.0, "bf16": 0.0}}
    kinds = by_cost([("a",), ("b",)], ("int8", "bf16"), costs, {"a": 1, "b": 1000}, 0.5)
    assert kinds == {"a": "int8", "b": "bf16"}


def test_more_than_fp32_cannot_be_had():
    """Costs that no kind lowers end the search: here of layers that cost nothing, with less than nothing allowed."""
    costs = {name: {kind: 0.0 for kind in KINDS} for name in NAMES}
    assert set(by_cost(UNITS, KINDS, costs, dict.fromkeys(NAMES, 1), -1.0).values()) == {"int4"}
