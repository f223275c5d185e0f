"""Entities out of tags, and their F1, against spans and counts worked out by hand."""

import pytest

from prunekern.tasks.entities import entities, entity_f1, fits, marks_spans


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),  # as conlleval: no B needed
        ("B-PER I-LOC I-LOC I-PER", [("PER", 0, 0), ("LOC", 1, 2), ("PER", 3, 3)]),  # another kind is another entity
        ("B-PER I-ORG-SUB", [("PER", 0, 0), ("ORG-SUB", 1, 1)]),  # the first dash counts
        ("S-PER S-PER B-LOC I-LOC E-LOC I-LOC", [("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 4), ("LOC", 5, 5)]),
        ("U-PER B-LOC L-LOC L-LOC", [("PER", 0, 0), ("LOC", 1, 2), ("LOC", 3, 3)]),
        ("B-X M-X E-X O E-X", [("X", 0, 2), ("X", 4, 4)]),
        ("B I O I B", [("", 0, 1), ("", 3, 3), ("", 4, 4)]),
        ("B-PER I-PER", [("PER", 0, 1)]),  # to the last word
    ],
)
def test_spans(tags, spans):
    assert entities(tags.split()) == spans


def test_tags_that_mark_spans():
    assert marks_spans(["B-PER", "I-PER", "O"]) and marks_spans(["B", "I", "O"]) and marks_spans(["I-X"])
    assert not marks_spans(["O"]) and not marks_spans(["NN", "VB", "O"]) and not marks_spans(["B-PER", "PER"])
    assert not marks_spans(["0", "1"]) and not fits("B-") and not fits("-PER") and not fits("") and not fits("b-PER")


def test_f1_by_hand():
    """Wanted: PER 0-1, LOC 3; ORG 0; three in all. Said: PER 0-1 (right), PER 3 (kind), ORG 0-1 (end), LOC 2 (none)."""
    wanted = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O", "O"]]
    said = [["B-PER", "I-PER", "O", "B-PER"], ["B-ORG", "I-ORG", "B-LOC"]]
    assert entity_f1(wanted, said) == pytest.approx(2 * 1 / (3 + 4))  # precision 1/4, recall 1/3
    assert entity_f1(wanted, wanted) == 1.0
    assert entity_f1([["O"]], [["O"]]) == 0.0 and entity_f1([["B-A"]], [["O"]]) == 0.0


def test_the_same_span_of_two_sentences_is_two_entities():
    wanted, said = [["B-A"], ["B-A"]], [["B-A"], ["O"]]
    assert entity_f1(wanted, said) == pytest.approx(2 / 3)
