"""What tensors of a checkpoint are called in a model: transformers has renamed parts of some architectures (ViT), reads
both, and writes the old names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def names_in(model: PreTrainedModel) -> Callable[[str], str]:
    """From a tensor's name in a file to that in `model`; names that are those of the model stay."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found = [one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)]

    def rename(name: str) -> str:
        for renaming in found:
            name, _ = renaming.rename_source_key(name)
        return name

    return rename
