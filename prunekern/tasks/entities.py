"""Entities out of tags: spans as the CoNLL shared tasks read and score them (their conlleval, and so seqeval)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OUTSIDE = "O"
IGNORED = -100  # number of no tag: neither losses nor metrics count it, as PyTorch and transformers have it
_SINGLE, _BEGINS, _INSIDE, _ENDS = ("S", "U"), ("B",), ("I", "M"), ("E", "L")  # BIO, IOBES, BILOU and BMES
_PREFIXES = _SINGLE + _BEGINS + _INSIDE + _ENDS


class Entity(NamedTuple):
    """kind: what stands behind the dash, "" where nothing does. first, last: words, from 0, both inside."""

    kind: str
    first: int
    last: int


def marks_spans(names: Sequence[str]) -> bool:
    """Whether every tag is "O", or says by its first letter where in a span it stands: "B-PER", "I-PER", "B"."""
    return any(name != OUTSIDE for name in names) and all(fits(name) for name in names)


def fits(name: str) -> bool:
    """Whether a tag is one of such."""
    prefix, dash, kind = name.partition("-")
    return name == OUTSIDE or (prefix in _PREFIXES and bool(kind) == bool(dash))


def entities(tags: Sequence[str]) -> list[Entity]:
    """Those of one sentence. A span begins where its first tag says so, after one that ended, and where the kind
    changes: "I-PER" after "O" begins one, too.
    """
    found: list[Entity] = []
    is_open = False  # whether the last entity may go on
    for place, tag in enumerate(tags):
        if tag == OUTSIDE:
            is_open = False
            continue
        prefix, _, kind = tag.partition("-")
        if is_open and prefix not in _BEGINS + _SINGLE and found[-1].kind == kind:
            found[-1] = found[-1]._replace(last=place)
        else:
            found.append(Entity(kind, place, place))
        is_open = prefix not in _ENDS + _SINGLE
    return found


def entity_f1(wanted: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> float:
    """F1 over the entities of all sentences: right where kind, first and last word are. 0 where there are none."""
    right = total = 0
    for tags, predicted in zip(wanted, said, strict=True):
        ours, theirs = set(entities(tags)), set(entities(predicted))
        right += len(ours & theirs)
        total += len(ours) + len(theirs)
    return 2 * right / total if total else 0.0
