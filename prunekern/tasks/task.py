"""What every source of data comes out as: splits, columns, labels, a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import EvalPrediction, PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")
TASK_TYPES = ("classification", "regression", "multi-label", "tokens")
NO_LIMIT = 1 << 30  # of a length in tokens; tokenizers that know no limit say 10^30, and take no such number


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the line or row, and what is accepted."""


@dataclass(frozen=True)
class Task:
    """Labelled text and how to score predictions on it: one class, or one number, to each.

    `MultiLabelTask` and `TokenTask` are those of several classes, and of a class for every word.

    name: what tables call it
    splits: DatasetDict with "train", "validation" and, where its labels are public, "test"
    text_columns: one column, or two for sentence pairs
    label_column: integers 0..num_labels-1, or floats for a regression
    label_names: in the order of the integers; None for a regression
    metric: the key of `compute_metrics`: "accuracy", "matthews", "pearson" or "spearman", the larger the better; or
        "mse", the smaller
    """

    name: str
    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...] | None
    metric: str

    @property
    def task_type(self) -> str:
        """One of TASK_TYPES."""
        return "regression" if self.label_names is None else "classification"

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: classes, or 1 for a regression."""
        return 1 if self.label_names is None else len(self.label_names)

    @property
    def score_split(self) -> str:
        """The split to take the final score on: "test" where its labels are public, else "validation"."""
        return "test" if "test" in self.splits else "validation"

    def model_class(self) -> Any:
        """What loads a model with a head for this task."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def show(self, value: float) -> str:
        """A score as tables print it: in points; a mean squared error as it is."""
        return f"{value:.4g}" if self.metric == "mse" else f"{100 * value:.2f}"

    def model_kwargs(self) -> dict[str, Any]:
        """For `model_class().from_pretrained` of a model without the head: head size, label names, kind of loss."""
        if self.label_names is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": self.num_labels,
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {label: index for index, label in enumerate(self.label_names)},
            "problem_type": self.problem_type,
        }

    @property
    def problem_type(self) -> str | None:
        """What transformers' configs call the task, which says the loss; None where a model class has one loss only."""
        return "regression" if self.label_names is None else "single_label_classification"

    def take(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> Task:
        """The same task with at most that many rows per split, drawn without replacement; None keeps the
        split whole.

        The draw depends on `seed` only, and a smaller one is contained in a larger one.
        Raises ValueError for a number below 1.
        """
        return replace(self, splits=take_rows(self.splits, (train, validation, test), seed))

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> DatasetDict:
        """Token ids of every split, cut to max_length, not padded (`collator` does that, batch by batch).

        max_length: in tokens, special ones included.
        Columns of the result: what the tokenizer returns (input_ids, attention_mask, maybe token_type_ids),
        labels (int64; float32 for a regression and several classes) and length (tokens of the row, for
        `train_sampling_strategy="group_by_length"`).
        Raises ValueError when max_length exceeds what the tokenizer's model takes or leaves no room for text.
        """
        pair = len(self.text_columns) == 2
        least = tokenizer.num_special_tokens_to_add(pair=pair) + len(self.text_columns)
        most = min(tokenizer.model_max_length, NO_LIMIT)
        if not least <= max_length <= most:
            raise ValueError(f"encode: max_length must be in {least}..{most} (got {max_length})")
        return self.splits.map(
            _encode_batch,
            batched=True,
            remove_columns=self.splits["train"].column_names,
            features=self._encoded_features(tokenizer),
            fn_kwargs={
                "tokenizer": tokenizer,
                "text_columns": self.text_columns,
                "label_column": self.label_column,
                "max_length": max_length,
            },
            desc="encoding",
        )

    def _encoded_features(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        from datasets import Features, List, Value

        # As the tokenizer's own outputs, but with one width for every split: an empty row must not change the
        # type.
        sizes = {"input_ids": "int32", "attention_mask": "int8", "token_type_ids": "int8"}
        tokens = {name: List(Value(sizes.get(name, "int64"))) for name in tokenizer.model_input_names}
        return Features({**tokens, "labels": self.label_feature(), "length": Value("int32")})

    def text_feature(self) -> Any:
        """What `datasets` holds a text as."""
        from datasets import Value

        return Value("string")

    def label_feature(self) -> Any:
        """What `datasets` holds a row's labels as."""
        from datasets import Value

        return Value("float32" if self.label_names is None else "int64")

    def count_cut(self, tokenizer: PreTrainedTokenizerBase, max_length: int, split: str) -> int:
        """Rows of a split that have more than max_length tokens, which `encode` cuts."""
        count = 0
        for rows in self.splits[split].iter(1000):
            ids = tokenizer(*(self.texts(rows[name]) for name in self.text_columns), verbose=False)["input_ids"]
            count += sum(len(row) > max_length for row in ids)
        return count

    def texts(self, column: list[Any]) -> list[str]:
        """What a tokenizer is given of a text column's values."""
        return column

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None
    ) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """A callable: list of encoded rows -> dict of tensors [rows, tokens], padded to the longest row."""
        return Collator(tokenizer, pad_to_multiple_of)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """{metric: value} in [-1, 1] or [0, 1] ("mse": from 0); for `Trainer(compute_metrics=...)`.

        prediction.predictions: logits [rows, num_labels] (or a tuple that starts with them); regression
        [rows] or [rows, 1]. prediction.label_ids: [rows]. Raises ValueError, see `metrics.score`.
        """
        from . import metrics

        return {self.metric: metrics.score(self.metric, prediction.predictions, prediction.label_ids)}


def take_rows(splits: DatasetDict, most: Sequence[int | None], seed: int) -> DatasetDict:
    """At most that many rows of train, validation and test, drawn without replacement; None keeps a split whole.

    The draw depends on `seed` only, and a smaller one is contained in a larger one.
    Raises ValueError for a number below 1.
    """
    taken = {}
    for name, rows in zip(SPLITS, most, strict=True):
        if rows is not None and rows < 1:
            raise ValueError(f"take: {name} must be at least 1 row (got {rows})")
        if name in splits:
            data = splits[name]
            whole = rows is None or rows >= len(data)
            taken[name] = data if whole else data.shuffle(seed=seed).select(range(rows or 0))
    return type(splits)(taken)


class Collator:
    """Dynamic padding of encoded rows. Drops the length column, which no model takes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None):
        from transformers import DataCollatorWithPadding

        self._pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        padded: dict[str, Any] = self._pad(
            [{name: value for name, value in row.items() if name != "length"} for row in rows]
        )
        return padded


def _encode_batch(
    rows: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    text_columns: tuple[str, ...],
    label_column: str,
    max_length: int,
) -> dict[str, list[Any]]:
    encoded = tokenizer(*(rows[name] for name in text_columns), truncation=True, max_length=max_length)
    return {
        **encoded,
        "labels": rows[label_column],
        "length": [len(ids) for ids in encoded["input_ids"]],
    }


def label_dataset(
    columns: dict[str, list[Any]],
    text_columns: tuple[str, ...],
    label_column: str,
    text_feature: Any,
    label_feature: Any,
) -> Dataset:
    """An in-memory split: texts and labels as `Task.text_feature` and `Task.label_feature` say, other columns as they
    come.
    """
    from datasets import Dataset, Features

    types = {name: text_feature for name in text_columns}
    types[label_column] = label_feature
    for name, values in columns.items():
        if name not in types:
            types[name] = Dataset.from_dict({name: values[:1]}).features[name]
    return Dataset.from_dict({name: columns[name] for name in types}, features=Features(types))
