"""Input and output embeddings in an adapter: when they are written, and room for them in the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..compacting.head import word_embeddings
from ..storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedding_names(model: PreTrainedModel, choice: bool | str) -> list[str]:
    """Parameter names of input and output embeddings (once where they are tied), if they are to be written.

    choice: as `save_embeddings` of `save_adapter`. ValueError for True and a model that is none of transformers, or has
    no embeddings.
    """
    table = word_embeddings(model)
    if table is None and choice is True:
        raise ValueError(f"save_adapter: save_embeddings must be False or 'auto' for {type(model).__name__} (got True)")
    if table is None or choice is False or (choice == "auto" and not _has_other_tokens(model)):
        return []
    modules = (table, model.get_output_embeddings())
    weights = {id(module.weight) for module in modules if module is not None}
    return [name for name, parameter in model.named_parameters() if id(parameter) in weights]


def _has_other_tokens(model: PreTrainedModel) -> bool:
    """Whether the base model, where it can be found without a network, has another number of tokens."""
    base = getattr(model.config, "_name_or_path", "")
    words: Any = word_embeddings(model)
    config = _config_of(base) if base and words is not None else {}
    if "vocab_size" not in config:
        return False
    own = words.weight.shape[0]
    return type(config.get("vocab_size")) is int and config["vocab_size"] != own


def _config_of(base: str) -> dict[str, Any]:
    """config.json of a model folder, or of a hub name in the cache; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file: object = Path(base) / "config.json"
    try:
        if not Path(base).is_dir():
            file = try_to_load_from_cache(base, "config.json")
        return read_json(Path(file)) if isinstance(file, (str, Path)) else {}
    except (OSError, ValueError, HFValidationError):
        return {}


def resized_for(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Give `model`, dense, as many tokens as the embeddings in `tensors` have; nothing where they bring none."""
    words: Any = word_embeddings(model)
    if words is None:
        return
    weight = words.weight
    own = [name for name, parameter in model.named_parameters() if parameter is weight and name in tensors]
    if own and tensors[own[0]].dim() == 2 and tensors[own[0]].shape[0] != weight.shape[0]:
        model.resize_token_embeddings(tensors[own[0]].shape[0], mean_resizing=False)
