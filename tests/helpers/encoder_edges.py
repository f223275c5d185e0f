"""Edges of the equality, by name: which channels of the last of an encoder's blocks are kept, by part."""

import numpy as np

from tests.helpers.tiny_models import FFN, HEAD_DIM, HIDDEN


def only(size, *ranges):
    kept = np.zeros(size, bool)
    for first, last in ranges:
        kept[first:last] = True
    return kept


def head(index, width=HEAD_DIM):
    return index * HEAD_DIM, index * HEAD_DIM + width


NONE, NO_FFN = np.zeros(HIDDEN, bool), np.zeros(FFN, bool)
HEADS_0_2 = only(HIDDEN, head(0), head(2))
EDGES = {
    "layer intact": {},
    "head vanished": {"v": HEADS_0_2},
    "heads of unequal width": {"v": only(HIDDEN, head(0, 3), head(1, 7), head(2), head(3, 1))},
    "head without query and key": {"q": HEADS_0_2},
    "no query and key in the layer": {"q": NONE},
    "query wider than value": {
        "q": only(HIDDEN, head(0), head(1), head(2)),
        "v": only(HIDDEN, head(0, 2), head(1, 1), head(3, 2)),
    },
    "value wider than query": {
        "q": only(HIDDEN, head(0, 2), head(3, 1)),
        "v": only(HIDDEN, head(0), head(1, 5), head(3)),
    },
    "head with queries but no values": {"q": only(HIDDEN, head(1)), "v": HEADS_0_2},
    "one channel of each": {"q": only(HIDDEN, (5, 6)), "v": only(HIDDEN, (17, 18)), "up": only(FFN, (95, 96))},
    "o without input": {"v": NONE},
    "o without input and without rows": {"v": NONE, "o": NONE},
    "rows of o": {"o": only(HIDDEN, (3, 20), (40, 41))},
    "rows of down": {"down": only(HIDDEN, (0, 1), (30, 48))},
    "all rows of o gone": {"o": NONE},
    "all rows of down gone": {"down": NONE},
    "FFN empty": {"up": NO_FFN},
    "FFN empty and rows of down": {"up": NO_FFN, "down": only(HIDDEN, (7, 13))},
    "whole attention gone": {"q": NONE, "v": NONE, "o": NONE},
    "whole FFN gone": {"up": NO_FFN, "down": NONE},
    "whole layer gone": {"q": NONE, "v": NONE, "o": NONE, "up": NO_FFN, "down": NONE},
}
