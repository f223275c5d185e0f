"""Movie-review sentences with mean human ratings, our stand-in for SST-2 where the hub is out of reach.

Hutto and Gilbert, "VADER" (ICWSM 2014): 10,605 sentences of movie reviews, each rated by at least 20 people
on a scale from -4 to 4. The file ships in the source archive of vaderSentiment 3.3.2 (MIT). It is not SST-2,
and tables must not call it so.
"""

from __future__ import annotations

from ..task import DataError, Task
from .archived import archived_task

NAME = "movie-review sentences"
SIZES = {"test": 2500, "validation": 500}  # the rest, 7,072 sentences, is for training
LEAST_RATING = 0.5  # a mean rating closer to zero than this is called neutral and left out

_OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def load() -> Task:
    """10,072 sentences with |mean rating| >= 0.5, labelled by its sign; metric accuracy.

    Labels: 0 negative, 1 positive. Columns: sentence, label, idx (the number in the source file), rating.
    The split is the same everywhere: 2,500 test, 500 validation, 7,072 train.
    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    from .fetch import VADER, fetch, read_member

    rows = parse(read_member(read_member(fetch(VADER), _OUTER), _INNER).decode("utf-8"))
    numbers, ratings, sentences = zip(*rows, strict=True)
    labels = [int(rating > 0) for rating in ratings]
    return archived_task(NAME, sentences, labels, ("negative", "positive"), SIZES, idx=numbers, rating=ratings)


def parse(text: str) -> list[tuple[int, float, str]]:
    """(number, mean rating, sentence) of every line with |rating| >= 0.5.

    text: lines of number TAB rating TAB sentence. Raises DataError naming the line that is not of that form.
    """
    rows = []
    for line, record in enumerate(text.split("\n"), start=1):
        if not record.strip():
            continue
        try:
            number, rating, sentence = record.rstrip("\r").split("\t")
            row = (int(number), float(rating), sentence.strip())
        except ValueError as error:
            raise DataError(f"{_INNER} line {line}: expected number, rating, sentence ({error})") from error
        if abs(row[1]) >= LEAST_RATING:
            rows.append(row)
    return rows
