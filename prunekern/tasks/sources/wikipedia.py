"""Paragraphs of English Wikipedia: running text for language models.

Miller et al., "The Effect of Natural Distribution Shift on Question Answering Models" (ICML 2020) and Rajpurkar et al.
(EMNLP 2016): the paragraphs that the questions of SQuAD are about, without the questions. They ship in bigbench 1.0.0.
"""

from __future__ import annotations

import json

from ..language import LanguageTask, language_task
from ..split import grouped_split
from . import bigbench

NAME = "Wikipedia paragraphs"
SIZES = {"test": 120_000, "validation": 60_000}  # characters, in whole articles; the rest is for training

_INSIDE = "squad_shifts/"
_FILES = ("new_wiki_v1.0.json", "squaddev_v1.1.json")


def load() -> LanguageTask:
    """About 2.8 million characters, a document an article; metric perplexity. Articles are split, not paragraphs.

    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    articles: dict[str, list[str]] = {}
    folder = bigbench.unpacked("wikipedia", {_INSIDE + file: file for file in _FILES})
    for file in _FILES:
        for article in json.loads((folder / file).read_text(encoding="utf-8"))["data"]:
            articles.setdefault(article["title"], []).extend(p["context"].strip() for p in article["paragraphs"])
    titles = sorted(articles)
    texts = ["\n".join(dict.fromkeys(articles[title])) for title in titles]  # no paragraph twice
    order = grouped_split(titles, {"all": len(titles)})["all"]  # by a hash of the title: the same everywhere
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    left = dict(SIZES)
    for i in order:
        name = next((n for n, room in left.items() if room > 0), "train")
        parts[name].append(texts[i])
        if name in left:
            left[name] -= len(texts[i])
    return language_task(NAME, parts)
