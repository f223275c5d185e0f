"""Multiple choice for causal language models: the continuation that the model finds likeliest is its answer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .causal import CausalTask
from .files import check_text
from .sources.readers import read
from .split import check_shares, draw, grouped_split, text_key
from .task import NO_LIMIT, SPLITS, DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NO_LABEL = 0  # of the continuation counts: a choice that an item of the batch does not have


class Item(NamedTuple):
    """contexts, continuations: one of each per choice, 2 or more. label: the right choice, from 0."""

    contexts: list[str]
    continuations: list[str]
    label: int


@dataclass(frozen=True)
class ChoiceTask(CausalTask):
    """Items with choices of which one is right; what `Task` is for labelled texts.

    name: what tables call it. splits: DatasetDict with "train", "validation" and "test", columns as `Item`'s fields.
    A choice is scored by the log-likelihood of its continuation after its context, summed over tokens (lm-eval's
    "acc"). metric: "accuracy".
    """

    name: str
    splits: DatasetDict
    metric: str = "accuracy"
    score_split: str = "test"

    def show(self, value: float) -> str:
        """A score as tables print it, in points."""
        return f"{100 * value:.2f}"

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> DatasetDict:
        """Token ids of every choice: context, then continuation; what is longer than max_length loses its beginning.

        Columns: input_ids [choices][tokens], counted [choices] (tokens of the continuation), labels, length (tokens of
        the longest choice). Raises ValueError when max_length is not in 2..what the tokenizer's model takes, or a
        continuation does not leave room for one token before it.
        """
        return type(self.splits)({name: _encoded(rows, tokenizer, max_length) for name, rows in self.splits.items()})

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """A callable: list of encoded items -> input_ids and attention_mask [items * choices, tokens], padded on the
        left; counted [items, choices], 0 where an item has fewer choices; labels [items].
        """
        return Collator(tokenizer.pad_token_id)

    def objective(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of the right choice, the choices' log-likelihoods being the logits: a scalar."""
        from torch.nn import functional as F

        return F.cross_entropy(log_likelihoods(model, inputs), inputs["labels"])

    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        split: str | None = None,
        track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> tuple[dict[str, float], Tensor]:
        """({"accuracy": share of right answers}, log-likelihoods [items, choices]) on the scored split."""
        import torch

        data = _encoded(self.splits[split or self.score_split], tokenizer, max_length)
        device = next(model.parameters()).device
        order = torch.tensor(data["length"], device="cpu").argsort(stable=True).tolist()
        collate, rows = self.collator(tokenizer), [data[i] for i in order]
        choices = max(len(row["counted"]) for row in rows)
        scores = torch.full((len(rows), choices), float("-inf"), dtype=torch.float32, device="cpu")
        for first in track(range(0, len(rows), 16)):
            inputs = {k: v.to(device) for k, v in collate(rows[first : first + 16]).items()}
            found = log_likelihoods(model, inputs).cpu()
            scores[torch.tensor(order[first : first + 16], device="cpu"), : found.shape[1]] = found
        right = scores.argmax(1) == torch.tensor(data["labels"], device="cpu")
        return {self.metric: right.double().mean().item()}, scores


def log_likelihoods(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Sum of the log-probabilities of every choice's continuation, fp32 [items, choices]; -inf where there is none.

    inputs: as `ChoiceTask.collator` makes them.
    """
    import torch
    from torch.nn import functional as F

    ids, counted = inputs["input_ids"], inputs["counted"]
    most = int(counted.max())
    # The vocabulary is wide: logits of nothing before the longest continuation.
    out = model(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False, logits_to_keep=most + 1)
    logits = out.logits[:, -most - 1 : -1].float()  # [rows, most, vocabulary]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, -most:].flatten(), reduction="none").view(-1, most)
    place = torch.arange(most, device=ids.device)
    counts = counted.flatten().unsqueeze(1)
    loss = loss.where(place >= most - counts, 0.0)
    return -loss.sum(1).view_as(counted).masked_fill(counted == NO_LABEL, float("inf"))


class Collator:
    """See `ChoiceTask.collator`."""

    def __init__(self, pad: int):
        self._pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        choices = max(len(row["counted"]) for row in rows)
        tokens = max(len(ids) for row in rows for ids in row["input_ids"])
        input_ids = torch.full((len(rows), choices, tokens), self._pad, device="cpu")
        mask = torch.zeros_like(input_ids)
        mask[..., -1] = 1  # a row without any token to look at has no answer to give, not even one to ignore
        counted = torch.full((len(rows), choices), NO_LABEL, device="cpu")
        for i, row in enumerate(rows):
            for j, ids in enumerate(row["input_ids"]):
                input_ids[i, j, tokens - len(ids) :] = torch.tensor(ids, device="cpu")
                mask[i, j, tokens - len(ids) :] = 1
            counted[i, : len(row["counted"])] = torch.tensor(row["counted"], device="cpu")
        return {
            "input_ids": input_ids.flatten(0, 1),
            "attention_mask": mask.flatten(0, 1),
            "counted": counted,
            "labels": torch.tensor([row["labels"] for row in rows], device="cpu"),
        }


def _encoded(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """See `ChoiceTask.encode`."""
    most = min(tokenizer.model_max_length, NO_LIMIT)
    if not 2 <= max_length <= most:
        raise ValueError(f"encode: max_length must be in 2..{most} (got {max_length})")
    given = {"tokenizer": tokenizer, "max_length": max_length}
    return rows.map(_encode_batch, batched=True, remove_columns=rows.column_names, fn_kwargs=given, desc="encoding")


def _encode_batch(
    rows: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    contexts, continuations = ([text for row in rows[name] for text in row] for name in ("contexts", "continuations"))
    whole = _without_end(tokenizer, [c + e for c, e in zip(contexts, continuations, strict=True)])
    known = _without_end(tokenizer, contexts)
    counts = [max(1, len(ids) - len(before)) for ids, before in zip(whole, known, strict=True)]
    for ids, count, continuation in zip(whole, counts, continuations, strict=True):
        if count >= min(max_length, len(ids)):
            raise ValueError(
                f"encode: max_length must leave room before the {count} tokens of {continuation!r} (got {max_length})"
            )
    encoded: dict[str, list[Any]] = {"input_ids": [], "counted": [], "labels": rows["label"], "length": []}
    first = 0
    for row in rows["contexts"]:
        choices = slice(first, first + len(row))
        encoded["input_ids"].append([ids[-max_length:] for ids in whole[choices]])
        encoded["counted"].append(counts[choices])
        encoded["length"].append(max(map(len, encoded["input_ids"][-1])))
        first = choices.stop
    return encoded


def _without_end(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids, without the end that some tokenizers put after every text: a continuation goes on where it stands."""
    end = tokenizer.eos_token_id
    return [i[:-1] if end is not None and i and i[-1] == end else i for i in tokenizer(texts)["input_ids"]]


def choice_task(name: str, items: Mapping[str, Sequence[Item]]) -> ChoiceTask:
    """Of items by split."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    text = List(Value("string"))
    features = Features({"contexts": text, "continuations": text, "label": Value("int64")})
    splits = {
        split: Dataset.from_dict({f: [getattr(i, f) for i in part] for f in Item._fields}, features=features)
        for split, part in items.items()
    }
    return ChoiceTask(name, DatasetDict({split: splits[split] for split in SPLITS}))


def split_items(items: Sequence[Item], keys: Sequence[str], sizes: Mapping[str, int]) -> dict[str, list[Item]]:
    """Items by split, drawn by `split.grouped_split`: those of one key in one split."""
    return {name: [items[i] for i in index] for name, index in grouped_split(keys, sizes).items()}


def load(
    path: str | os.PathLike[str],
    text: str = "text",
    choices: str = "choices",
    label: str = "label",
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> ChoiceTask:
    """A task out of one to three .jsonl or .parquet files.

    text: the column of what stands before the choices, as the model shall see it ("Question: ... Answer:"); a space
        joins it to a choice. choices: a list of strings. label: the right one's place, from 0, or its text.
    What is not given is drawn from `path`, as in `files.load`.
    Raises FileNotFoundError; ValueError for a share outside (0, 1); DataError, naming file and line, for a
    blank text, fewer than two choices, a label that is none of them, and whatever `readers.read` refuses.
    """
    check_shares("choices file", validation_share, test_share)
    files = {"train": path, "validation": validation, "test": test}
    items = {n: _items(Path(file), text, choices, label) for n, file in files.items() if file is not None}
    shares = {"test": test_share, "validation": validation_share}
    wanted = {name: share for name, share in shares.items() if name not in items}
    train = items["train"]
    rows = draw(path, [text_key(i.contexts[0], *i.continuations) for i in train], wanted)
    return choice_task(Path(path).name, items | {name: [train[i] for i in index] for name, index in rows.items()})


def _items(path: Path, text: str, choices: str, label: str) -> list[Item]:
    items = []
    for where, (context, listed, answer) in read(path, (text, choices, label)):
        check_text(where, text, context)
        if not isinstance(listed, list) or len(listed) < 2:
            raise DataError(f"{where}: choices {choices!r} must be a list of two strings or more (got {listed!r})")
        for one in listed:
            check_text(where, choices, one)
        place = listed.index(answer) if isinstance(answer, str) and answer in listed else answer
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(listed):
            accepted = f"one of the choices, or in 0..{len(listed) - 1}"
            raise DataError(f"{where}: label {label!r} must be {accepted} (got {answer!r})")
        items.append(Item([context] * len(listed), [" " + one.strip() for one in listed], place))
    return items
