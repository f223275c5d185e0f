"""The deterministic split: every row once, sizes met, duplicates together, order of rows without effect."""

from hypothesis import given
from hypothesis import strategies as st

from prunekern.tasks.split import grouped_split, text_key

KEYS = st.lists(st.text("abc", max_size=3), max_size=60)


@given(KEYS, st.integers(0, 20), st.integers(0, 20))
def test_partition(keys, test, validation):
    parts = grouped_split(keys, {"test": test, "validation": validation})
    assert sorted(row for rows in parts.values() for row in rows) == list(range(len(keys)))
    homes = {}
    for name, rows in parts.items():
        for row in rows:
            assert homes.setdefault(keys[row], name) == name
    for name, size in (("test", test), ("validation", validation)):
        assert len(parts[name]) <= size
        for row in parts["train"]:  # short of its size only where no key that went to training fits
            assert len(parts[name]) + keys.count(keys[row]) > size


@given(KEYS, st.randoms(use_true_random=False))
def test_order_of_the_rows_does_not_matter(keys, random):
    shuffled = list(keys)
    random.shuffle(shuffled)
    first, second = (grouped_split(each, {"test": 7, "validation": 5}) for each in (keys, shuffled))
    for name in first:
        assert [keys[row] for row in first[name]] == [shuffled[row] for row in second[name]]


PINNED = [10, 6, 3, 8, 0, 11, 5, 7, 9, 1, 4, 2]  # numbers N in the order of sha256("sentence N")


def test_pinned():
    """The split is part of every published figure: changing it must not go unnoticed."""
    parts = grouped_split([f"sentence {number}" for number in range(12)], {"test": 3, "validation": 2})
    assert parts == {"test": PINNED[:3], "validation": PINNED[3:5], "train": PINNED[5:]}


def test_what_counts_as_a_duplicate():
    assert text_key("It's GOOD!") == text_key("it s   good") != text_key("it is good")
    assert text_key("!!!") != text_key("???") != text_key("")
    assert text_key("a b", "c") != text_key("a", "b c")
    assert text_key("ÉTÉ") == text_key("été")
