"""School science questions with four choices.

QASC (Khot et al., AAAI 2020), of which the natural instructions of bigbench 1.0.0 hold questions with the right answer
and three or more wrong ones.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from ..choice import ChoiceTask, Item, choice_task, split_items
from ..split import text_key
from . import bigbench

NAME = "science questions"
SIZES = {"test": 1000, "validation": 500}

_INPUT = re.compile(r"Fact: .*?\nQuestion: (?P<question>.*?)\s*\nCorrect Answer: (?P<right>.*?)\.?\s*$", re.DOTALL)


def load() -> ChoiceTask:
    """Questions of four choices; the fact that the answer was written from is left out. Metric accuracy.

    Raises prunekern.tasks.fetch.FetchError when the archive cannot be fetched.
    """
    rows = records()
    items = [as_item(row) for row in rows]
    return choice_task(NAME, split_items(items, [text_key(row["question"]) for row in rows], SIZES))


def records() -> list[dict[str, Any]]:
    """Rows of question, choices (four strings) and label (the right one's place)."""
    rows, seen = [], set()
    for example in bigbench.instructions("science", "subtask042_qasc_incorrect_option_generation"):
        found = _INPUT.search(example["input"])
        if found is None or text_key(found["question"]) in seen:
            continue
        right = found["right"].strip()
        choices = [right, *(wrong.strip().rstrip(".") for wrong in example["target"][:3])]
        if len({text_key(c) for c in choices}) < 4 or not all(choices):
            continue
        seen.add(text_key(found["question"]))
        choices.sort(key=lambda c: hashlib.sha256(c.encode()).digest())  # an order that tells nothing
        rows.append({"question": found["question"], "choices": choices, "label": choices.index(right)})
    return rows


def as_item(row: dict[str, Any]) -> Item:
    """Prompted as lm-eval prompts ARC."""
    return Item([f"Question: {row['question']}\nAnswer:"] * 4, [" " + c for c in row["choices"]], row["label"])
