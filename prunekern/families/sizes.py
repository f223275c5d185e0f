"""Sizes that a transformers config names, held against the tensors of its checkpoint before anything is made of them.

A damaged number of layers is a loop without end, a damaged width or vocabulary more memory than there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Fields of the configs of all families: DistilBERT's first, then what the others call the same.
WIDTHS = ("dim", "hidden_dim", "n_heads", "hidden_size", "intermediate_size", "num_attention_heads")
DERIVED = ("num_key_value_heads", "head_dim")  # null: of the others
LAYERS = ("n_layers", "num_hidden_layers")
_WORDS = ("word_embeddings.weight", "embed_tokens.weight", "token_embedding.weight", "tok_embeddings.weight")
# Field -> ends of the tensors' names, and the dimension that it is.
TABLES = {
    "vocab_size": (_WORDS, 0),
    "dim": (("word_embeddings.weight",), 1),
    "hidden_size": ((*_WORDS, "position_embedding.weight"), 1),  # not beside the next, projected to it
    "embedding_size": (("word_embeddings.weight",), 1),
    "max_position_embeddings": (("position_embeddings.weight", "position_embedding.weight"), 0),
    "type_vocab_size": (("token_type_embeddings.weight",), 0),
    "relative_attention_num_buckets": (("relative_attention_bias.weight",), 0),
}
FIELDS = (*WIDTHS, *DERIVED, *LAYERS, *(f for f in TABLES if f not in WIDTHS), "num_labels")
# Configs of towers in the config of a model of text and images, and what their tensors begin with.
IMAGES = "vision_model."
TOWERS = {"text_config": "text_model.", "vision_config": IMAGES}
_BLOCK = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def check_sizes(
    fields: Mapping[str, Any], where: str, shapes: Mapping[str, tuple[int, ...]], widths: Iterable[int] = (),
    most_rows: int | None = None,
) -> None:  # fmt: skip
    """ValueError for the first size among `fields` (of a config, by name) that is none, or not that of the tensors.

    where: the file, for messages. shapes: of its tensors by name; of linears, perhaps, only what was kept. widths:
    those that such linears had. most_rows: of tables whose tensors are not among them; None: as of a width.
    Towers are held each against its own tensors; one without any is not made.
    """
    widths = tuple(widths)
    for field, prefix in TOWERS.items():
        own = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        tower = fields.get(field)
        if own and tower is not None:
            inner = tower if isinstance(tower, Mapping) else vars(tower)
            check_sizes(inner, f"{where}: {field}", own, widths, most_rows)
    dimensions = [n for shape in shapes.values() for n in shape] + list(widths)
    blocks = 1 + max((int(found[1]) for name in shapes if (found := _BLOCK.search(name))), default=-1)
    tables = {f: t for f, t in TABLES.items() if f != "hidden_size" or "embedding_size" not in fields}
    for field in FIELDS:
        if field not in fields or (fields[field] is None and field in DERIVED):
            continue
        value = fields[field]
        name, size = _table(tables.get(field, ((), 0)), shapes)
        if field == "type_vocab_size" and value == 0 and type(value) is int and not name:
            continue  # DeBERTa may have no table of token types
        if type(value) is not int or value < 1:
            raise ValueError(f"{where}: {field} must be a positive integer (got {value!r})")
        if field in LAYERS and blocks and value != blocks:
            raise ValueError(f"{where}: {field} must be {blocks}, as many as there are tensors for (got {value})")
        if name and value != size:
            raise ValueError(
                f"{where}: {field} must be {size}, as tensor {name!r} of shape {list(shapes[name])} says (got {value})"
            )
        if field == "max_position_embeddings" and not name and most_rows is None:
            continue  # rotary positions: no tensor has them
        most = max(dimensions, default=0) if field not in tables or most_rows is None else most_rows
        if not name and field not in LAYERS and value > most > 0:
            raise ValueError(f"{where}: {field} must be at most {most}, the largest size of a tensor (got {value})")


def _table(table: tuple[tuple[str, ...], int], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    """The tensor whose size a field is, and that size; ("", 0) where there is none. table: one of TABLES."""
    ends, dimension = table
    for name, shape in shapes.items():
        if name.endswith(ends) and len(shape) == 2 and ends:
            return name, shape[dimension]
    return "", 0
