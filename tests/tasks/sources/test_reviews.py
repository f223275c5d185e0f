"""The movie-review sentences: counts, labels, the shared split, and the parser's refusals."""

import hashlib

import pytest

from prunekern import tasks
from prunekern.tasks.sources import reviews
from prunekern.tasks.sources.fetch import VADER, fetch, read_member
from prunekern.tasks.split import text_key


@pytest.fixture(scope="module")
def task():
    return tasks.get("reviews")


@pytest.fixture(scope="module")
def source():
    """Rating and sentence by number, read without the code under test."""
    nested = read_member(fetch(VADER), "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    text = read_member(nested, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    records = [line.split("\t") for line in text.split("\r\n") if line]
    return {int(number): (float(rating), sentence) for number, rating, sentence in records}


def test_sizes_and_name(task):
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 7072, "validation": 500, "test": 2500}
    assert (task.name, task.label_names, task.metric) == (
        "movie-review sentences",
        ("negative", "positive"),
        "accuracy",
    )
    assert task.score_split == "test"


def test_rows_are_those_of_the_source(task, source):
    assert len(source) == 10605
    chosen = {number for number, (rating, _) in source.items() if abs(rating) >= 0.5}
    seen = [number for data in task.splits.values() for number in data["idx"]]
    assert len(seen) == 10072 and set(seen) == chosen
    for data in task.splits.values():
        for row in data:
            rating, sentence = source[row["idx"]]
            assert (row["sentence"], row["rating"], row["label"]) == (sentence.strip(), rating, int(rating > 0))
    assert sum(sum(data["label"]) for data in task.splits.values()) == 4996


def test_no_duplicate_straddles(task):
    keys = {split: {text_key(sentence) for sentence in data["sentence"]} for split, data in task.splits.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert not keys["test"] & keys["validation"]


def test_the_test_split_is_the_pinned_one(task):
    """Figures are comparable only on the same 2,500 sentences, in the same order."""
    digest = hashlib.sha256("\n".join(task.splits["test"]["sentence"]).encode()).hexdigest()
    assert digest == "598811851eefe5ede36af0999a607c7ad8ecddf0ad25a6f7d779fb350993d571"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_splits_are_balanced_alike(task, split):
    labels = task.splits[split]["label"][:]
    # 4,996 of 10,072: five standard deviations of a random draw of this size
    assert abs(sum(labels) / len(labels) - 4996 / 10072) < 5 * 0.5 / len(labels) ** 0.5
    # ... and so is any prefix, though the source file is sorted
    assert 0.4 < sum(labels[:200]) / 200 < 0.6


@pytest.mark.parametrize("line", ["7 0.5 no tabs", "7\tx\tno rating", "x\t1.0\tno number", "7\t1.0"])
def test_a_line_of_another_form(line):
    with pytest.raises(
        tasks.DataError, match="movieReviewSnippets_GroundTruth.txt line 3: expected number, rating, sent"
    ):
        reviews.parse("1\t2.0\tfine\r\n\r\n" + line)
    assert reviews.parse("1\t2.0\tfine \r\n2\t-0.4\tnear zero\r\n3\t-0.5\tbad") == [(1, 2.0, "fine"), (3, -0.5, "bad")]
