"""Words and their tags, as files hold them, checked and numbered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .entities import IGNORED, fits
from .labels import Rows, class_name, class_names, unknown
from .task import DataError


def check_words(where: str, column: str, value: Any, tags: Any) -> None:
    """DataError unless it is a list of words, each a string with something in it, and the tags a list as long."""
    if value is None or tags is None:
        raise DataError(f"{where}: {'words' if value is None else 'tags'} are null")
    if not isinstance(value, list) or not isinstance(tags, list):
        what, got = ("words", value) if not isinstance(value, list) else ("tags", tags)
        raise DataError(f"{where}: {what} must be a list, one for each word (got {type(got).__name__})")
    if len(value) != len(tags):
        raise DataError(f"{where}: {len(value)} words, but {len(tags)} tags; every word has one")
    if not value:
        raise DataError(f"{where}: there are no words")
    for place, word in enumerate(value, start=1):
        if not isinstance(word, str):
            raise DataError(f"{where}: word {place} of {column!r} must be a string (got {type(word).__name__})")
        if not word.strip():
            raise DataError(f"{where}: word {place} of {column!r} is blank")
        if not word.isascii():
            try:
                word.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: word {place} of {column!r} holds half a character") from error


def number_tags(rows: Mapping[str, Rows], label: str, metric: str | None) -> tuple[str, ...]:
    """Replace the tags of every file by class numbers, IGNORED (-100, "-100") staying; returns the class names, those
    of the training file.

    metric: what is asked for; "accuracy" takes tags of any form. Otherwise DataError where some mark spans ("B-PER")
    and others do not.
    """
    for part in rows.values():
        part.labels = [[*_named(tags, where, label)] for tags, where in zip(part.labels, part.where, strict=True)]
    train = rows["train"]
    names = class_names((tag for tags in train.labels for tag in tags if tag is not None), train, label)
    begins = any(name.startswith(("B-", "I-")) for name in names)
    odd = next((name for name in names if not fits(name)), None)
    if odd is not None and (metric == "entity_f1" or metric is None and begins):
        place = next(place for place, tags in enumerate(train.labels) if odd in tags)
        raise DataError(
            f"{train.where[place]}: tag {odd!r} is neither O nor marks a span, as B-NAME and I-NAME do, which metric "
            "entity_f1 asks for; metric accuracy takes any"
        )
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)} | {None: IGNORED}
    for split, part in rows.items():
        for where, tags in zip(part.where, part.labels, strict=True):
            for word, tag in enumerate(tags, start=1):
                if tag not in numbers:
                    raise unknown(f"{where}, word {word}", tag, split, names)
        part.labels = [[numbers[tag] for tag in tags] for tags in part.labels]
    return names


def _named(tags: list[Any], where: str, label: str) -> Iterator[str | None]:
    """Names of the tags; None where nothing is asked."""
    asked = False
    for word, tag in enumerate(tags, start=1):
        if tag is None or tag != tag:  # NaN
            raise DataError(f"{where}, word {word}: tag is null")
        name = class_name(tag, f"{where}, word {word}", label, whole=False)
        asked = asked or name != str(IGNORED)
        yield None if name == str(IGNORED) else name
    if not asked:
        raise DataError(f"{where}: every tag is {IGNORED}, which asks about no word")
