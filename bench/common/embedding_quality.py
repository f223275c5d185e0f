"""What is left of an embedding model's answers: against those of the model it came from, and against topics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from bench.common.texts import Texts

NEAREST = 10
PAIRS = 20_000


@dataclass(frozen=True)
class Embedded:
    """Unit rows, [texts, width], of the test texts."""

    reviews: np.ndarray
    paragraphs: np.ndarray
    articles: np.ndarray

    @classmethod
    def of(cls, encode, texts: Texts) -> Embedded:
        """encode: list of texts -> [texts, width]."""
        return cls(*(unit(encode(t)) for t in (texts.reviews, texts.paragraphs, texts.articles)))

    @property
    def all(self) -> np.ndarray:
        return np.concatenate([self.reviews, self.paragraphs, self.articles])


def unit(x: np.ndarray) -> np.ndarray:
    """float64 rows of norm 1."""
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def quality(own: Embedded, original: Embedded, labels: list[int]) -> dict[str, float]:
    """spearman: rank correlation with the original's cosines over pairs drawn within each kind of text, the mean of the
    three. nearest: share of the original's ten nearest texts of all that are among its own ten. topics: accuracy of
    the nearest other article's topic; topics_kept: over the original's. cosine: mean with the original's embedding.
    """
    kinds = [(own.reviews, original.reviews), (own.paragraphs, original.paragraphs), (own.articles, original.articles)]
    spearman = float(np.mean([rank_correlation(a, b) for a, b in kinds]))
    topics, theirs = topic_accuracy(own.articles, labels), topic_accuracy(original.articles, labels)
    return {
        "spearman": spearman,
        "nearest": overlap(own.all, original.all),
        "topics": topics,
        "topics_kept": topics / theirs,
        "cosine": float((own.all * original.all).sum(1).mean()),
    }


def rank_correlation(own: np.ndarray, original: np.ndarray) -> float:
    """Spearman's, of cosines of PAIRS pairs of different texts, the same ones for every model."""
    draw = np.random.default_rng(0)
    i = draw.integers(len(own), size=PAIRS)
    j = (i + draw.integers(1, len(own), size=PAIRS)) % len(own)
    cosines = [(x[i] * x[j]).sum(1) for x in (own, original)]
    return float(spearmanr(*cosines).statistic)


def nearest(x: np.ndarray, count: int) -> np.ndarray:
    """[texts, count]: the most similar other texts of each, in no order."""
    cosines = x @ x.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, count, axis=1)[:, :count]


def overlap(own: np.ndarray, original: np.ndarray) -> float:
    """Share of the NEAREST nearest that both agree on."""
    a, b = nearest(own, NEAREST), nearest(original, NEAREST)
    return float(np.mean([len(set(p) & set(q)) / NEAREST for p, q in zip(a.tolist(), b.tolist(), strict=True)]))


def topic_accuracy(articles: np.ndarray, labels: list[int]) -> float:
    """Share of articles whose nearest other one has their topic."""
    at, topic = nearest(articles, 1)[:, 0], np.asarray(labels)
    return float((topic[at] == topic).mean())
