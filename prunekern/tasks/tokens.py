"""Token classification: a class for every word of a text."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .entities import IGNORED
from .task import NO_LIMIT, Task

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenTask(Task):
    """`Task` where every word has a class, its tag: names in a text (NER), parts of speech.

    text_columns: one, of lists of words. label_column: a list as long, 0..num_labels-1, or IGNORED (-100) for a word
    that is not asked about. metric: "entity_f1", of whole entities, for tags that mark spans ("B-PER", "I-PER", "O");
    or "accuracy", of words.
    """

    @property
    def task_type(self) -> str:
        """One of TASK_TYPES."""
        return "tokens"

    @property
    def problem_type(self) -> str | None:
        """None: a model with a head for tokens has one loss, cross-entropy over the tokens that have a label."""
        return None

    def model_class(self) -> Any:
        """What loads a model with a head for this task."""
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def texts(self, column: list[Any]) -> list[str]:
        """What a tokenizer is given: the words with a blank between them, as they stand in running text."""
        return [" ".join(words) for words in column]

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> DatasetDict:
        """Token ids of every split, cut to max_length, not padded; the first token of a word has its tag.

        Columns: what the tokenizer returns, labels (int64 [tokens]; IGNORED at special tokens, at the further tokens of
        a word, and where the tag says so) and length. Words behind the cut are neither trained on nor scored, and rows
        that keep no labelled word are left out, with a warning: their loss would be 0 / 0.
        Raises ValueError for a max_length that leaves no room for text or exceeds what the tokenizer's model takes, for
        a tokenizer that cannot tell where its tokens stand in the text (a slow one), and where no row of a split is
        left.
        """
        least, most = tokenizer.num_special_tokens_to_add() + 1, min(tokenizer.model_max_length, NO_LIMIT)
        if not least <= max_length <= most:
            raise ValueError(f"encode: max_length must be in {least}..{most} (got {max_length})")
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise ValueError(f"encode: tokenizer must be a fast one, for tokens must be found in the text (got {kind})")
        encoded = self.splits.map(
            _encode_batch,
            batched=True,
            remove_columns=self.splits["train"].column_names,
            features=self._encoded_features(tokenizer),
            fn_kwargs={
                "tokenizer": tokenizer,
                "text_column": self.text_columns[0],
                "label_column": self.label_column,
                "max_length": max_length,
            },
            desc="encoding",
        )
        for split, rows in encoded.items():
            kept = [i for i, labels in enumerate(rows["labels"]) if any(label != IGNORED for label in labels)]
            if not kept:
                raise ValueError(f"encode: max_length must leave a labelled word in split {split!r} (got {max_length})")
            if len(kept) < len(rows):
                warnings.warn(
                    f"{len(rows) - len(kept)} of {len(rows)} rows of split {split!r} have no labelled word in "
                    f"{max_length} tokens and are left out",
                    stacklevel=2,
                )
                encoded[split] = rows.select(kept)
        return encoded

    def text_feature(self) -> Any:
        """What `datasets` holds a row's words as."""
        from datasets import List, Value

        return List(Value("string"))

    def label_feature(self) -> Any:
        """What `datasets` holds a row's labels as."""
        from datasets import List, Value

        return List(Value("int64"))

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """A callable: list of encoded rows -> dict of tensors [rows, tokens], padded to the longest row, labels with
        IGNORED.
        """
        return TokenCollator(tokenizer, pad_to_multiple_of)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """{metric: value}, the task's own first: "entity_f1" where tags mark spans, and "accuracy".

        prediction.predictions: logits [rows, tokens, num_labels] (or a tuple that starts with them).
        prediction.label_ids: [rows, tokens], IGNORED where nothing is asked. Raises ValueError, see
        `metrics.score_tokens`.
        """
        from . import metrics

        assert self.label_names is not None
        found = metrics.score_tokens(prediction.predictions, prediction.label_ids, self.label_names)
        return {self.metric: found[self.metric], **found}


class TokenCollator:
    """See `TokenTask.collator`. Drops the length column, which no model takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        from transformers import DataCollatorForTokenClassification

        self._pad = DataCollatorForTokenClassification(
            tokenizer, pad_to_multiple_of=pad_to_multiple_of, label_pad_token_id=IGNORED
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        padded: dict[str, Any] = self._pad(
            [{name: value for name, value in row.items() if name != "length"} for row in rows]
        )
        return padded


def _encode_batch(
    rows: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    label_column: str,
    max_length: int,
) -> dict[str, list[Any]]:
    texts = [" ".join(words) for words in rows[text_column]]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    spans = encoded.pop("offset_mapping")
    labels = [
        _aligned(text, words, tags, row_spans)
        for text, words, tags, row_spans in zip(texts, rows[text_column], rows[label_column], spans, strict=True)
    ]
    return {**encoded, "labels": labels, "length": [len(ids) for ids in encoded["input_ids"]]}


def _aligned(text: str, words: Sequence[str], tags: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """A label for every token. text: the words with a blank between them. spans: of the tokens in it, characters from
    and up to; empty ones are of special tokens.
    """
    begins = [0]
    for word in words[:-1]:
        begins.append(begins[-1] + len(word) + 1)
    labels: list[int] = []
    last = -1
    for begin, end in spans:
        while begin < end and text[begin].isspace():  # a blank may be part of the token after it
            begin += 1
        place = bisect_right(begins, begin) - 1 if begin < end else last
        labels.append(tags[place] if place > last else IGNORED)
        last = max(last, place)
    return labels
