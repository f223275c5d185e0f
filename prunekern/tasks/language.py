"""Running text, and the perplexity of a language model on it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .causal import CausalTask
from .split import check_shares, draw, text_key
from .task import NO_LIMIT, SPLITS, DataError

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

METRIC = "perplexity"
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")  # blanks may stand in them


@dataclass(frozen=True)
class LanguageTask(CausalTask):
    """Texts to predict, word by word; what `Task` is for labelled ones.

    name: what tables call it. splits: DatasetDict with "train", "validation" and "test", one column "text", a document
    a row. metric: "perplexity", the smaller the better.
    """

    name: str
    splits: DatasetDict
    metric: str = METRIC
    score_split: str = "test"

    def show(self, value: float) -> str:
        """A score as tables print it."""
        return f"{value:.3f}"

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 256) -> DatasetDict:
        """Blocks of exactly max_length tokens: documents of a split joined with the end-of-text token, the rest cut.

        Columns: input_ids, labels (the same; the model shifts them), length. Raises ValueError when max_length is
        below 2 or above what the tokenizer's model takes, or when a split does not fill one block.
        """
        from datasets import Dataset

        most = min(tokenizer.model_max_length, NO_LIMIT)
        if not 2 <= max_length <= most:
            accepted = "at least 2" if most >= NO_LIMIT else f"in 2..{most}"
            raise ValueError(f"encode: max_length must be {accepted} (got {max_length})")
        encoded = {}
        for name, data in self.splits.items():
            tokens: list[int] = []
            for ids in tokenizer(list(data["text"]), add_special_tokens=False)["input_ids"]:
                tokens += [*ids, tokenizer.eos_token_id]
            blocks = [tokens[i : i + max_length] for i in range(0, len(tokens) - max_length + 1, max_length)]
            if not blocks:
                raise ValueError(
                    f"encode: max_length must be at most the {len(tokens)} tokens of split {name!r} (got {max_length})"
                )
            encoded[name] = Dataset.from_dict(
                {"input_ids": blocks, "labels": blocks, "length": [max_length] * len(blocks)}
            )
        return type(self.splits)(encoded)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """A callable: list of encoded rows -> dict of int64 tensors [rows, tokens]."""
        return _stack

    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        split: str | None = None,
        track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> tuple[dict[str, float], Tensor]:
        """({"perplexity": exp of the mean loss of a token}, losses [blocks, max_length - 1]) on the scored split."""
        import torch

        data, device = self.encode(tokenizer, max_length)[split or self.score_split], next(model.parameters()).device
        losses = [token_losses(model, torch.tensor([row["input_ids"]], device=device)) for row in track(list(data))]
        every = torch.cat(losses)
        return {METRIC: math.exp(every.double().mean().item())}, every


def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Loss of each token but the first, [rows, tokens - 1], fp32 on the CPU. ids: int64 [rows, tokens]."""
    from torch.nn import functional as F

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).cpu()


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.tensor([row[name] for row in rows], device="cpu") for name in ("input_ids", "labels")}


def language_task(name: str, documents: Mapping[str, Sequence[str]]) -> LanguageTask:
    """Of documents by split."""
    from datasets import Dataset, DatasetDict

    return LanguageTask(name, DatasetDict({n: Dataset.from_dict({"text": list(d)}) for n, d in documents.items()}))


def load(
    path: str | os.PathLike[str],
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
) -> LanguageTask:
    """A task out of one to three UTF-8 text files; documents are what blank lines stand between.

    What is not given is drawn from `path`, as the given share of its documents, the same way everywhere and with no
    duplicate in two splits. Raises FileNotFoundError; ValueError for a share outside (0, 1); DataError for a file
    that is not UTF-8, or holds too few documents.
    """
    check_shares("text file", validation_share, test_share)
    documents = {"train": _documents(Path(path))}
    given = {"validation": validation, "test": test}
    documents |= {name: _documents(Path(file)) for name, file in given.items() if file is not None}
    shares = {"test": test_share, "validation": validation_share}
    wanted = {name: share for name, share in shares.items() if given[name] is None}
    if wanted:  # else the documents keep their order
        whole = documents["train"]
        rows = draw(path, [text_key(d) for d in whole], wanted)
        documents |= {name: [whole[i] for i in index] for name, index in rows.items()}
    return language_task(Path(path).name, {name: documents[name] for name in SPLITS})


def _documents(path: Path) -> list[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"data file {path} {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    documents = [part.strip() for part in _BLANK_LINES.split(text)]
    documents = [part for part in documents if part]
    if not documents:
        raise DataError(f"{path}: holds no text")
    return documents
