"""WinoGrande: which of two things a blank stands for.

Sakaguchi et al. (AAAI 2020). The items ship, as pairs of twin sentences, in the natural instructions of bigbench 1.0.0;
they are of the training set, and which of them the public validation set holds is not known: figures on them compare
with each other, not with those of a leaderboard.
"""

from __future__ import annotations

import re

from ..choice import ChoiceTask, Item, choice_task, split_items
from ..split import text_key
from . import bigbench

NAME = "WinoGrande items"
SIZES = {"test": 2000, "validation": 1000}  # twins in one split

_TWINS = re.compile(
    r"Sentence 1:\s*(?P<one>.*?)\s*\nAnswer ?1:\s*(?P<first>.*?)\.?\s*"
    r"\nSentence 2:\s*(?P<two>.*?)\s*\nAnswer ?2:\s*(?P<second>.*?)\.?\s*$",
    re.DOTALL,
)


def load() -> ChoiceTask:
    """Items of two choices, scored as lm-eval's "winogrande": what follows the blank, after each choice in it.

    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    rows = records()
    items = [as_item(row) for row in rows]
    return choice_task(NAME, split_items(items, [row["twins"] for row in rows], SIZES))


def records() -> list[dict[str, str]]:
    """Rows as the hub's data set has them (sentence, option1, option2, answer: "1" or "2"), and "twins", alike for two
    sentences of a pair.
    """
    rows, seen = [], set()
    for example in bigbench.instructions("winogrande", "subtask029_winogrande_full_object"):
        for target in example["target"]:
            twins = _TWINS.search(target)
            if twins is None or text_key(target) in seen:
                continue
            seen.add(text_key(target))
            options = [twins["first"].strip(), twins["second"].strip()]
            if not all(options) or text_key(options[0]) == text_key(options[1]):
                continue
            for place, sentence in enumerate((twins["one"], twins["two"])):
                if sentence.count("_") == 1 and not sentence.endswith("_"):
                    row = dict(zip(("option1", "option2"), options, strict=True))
                    rows.append({"sentence": sentence, **row, "answer": str(place + 1), "twins": text_key(*options)})
    return rows


def as_item(row: dict[str, str]) -> Item:
    """Of the hub's columns."""
    before, after = row["sentence"].split("_")
    contexts = [before + row["option1"], before + row["option2"]]
    return Item(contexts, [" " + after.strip()] * 2, int(row["answer"]) - 1)
