"""A tokenizer beside a model's weights: that it is there, and that it goes where the model goes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip


def load_tokenizer(model: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained(model)`. FileNotFoundError for a folder without a tokenizer: transformers makes
    one that knows no word of it, and every score is then of unknown tokens.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    needed = {"tokenizer.json", *tokenizer.vocab_files_names.values()} if tokenizer.vocab_files_names else set()
    folder = Path(model)
    if needed and folder.is_dir() and not any((folder / name).is_file() for name in needed):
        raise FileNotFoundError(
            f"{model}: has no tokenizer (none of {', '.join(sorted(needed))}); write it there with "
            "tokenizer.save_pretrained"
        )
    return tokenizer


def copy_tokenizer(base: Path, out: Path) -> None:
    """The tokenizer's files of one folder into another, where they are not yet."""
    for name in FILES:
        if (base / name).is_file() and not (out / name).exists():
            shutil.copyfile(base / name, out / name)
