"""A compact model's way to the hub."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from ..compacting.checkpoint import save

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    command: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Compact model",
    weights: str | None = None,
) -> str:
    """Upload what `save` writes (weights: as there), the model card, and the tokenizer; returns the commit's address.

    The repository is made where it is missing. ValueError for a model that is not compact; what huggingface_hub raises
    where the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, command=command, weights=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))
