"""Models of sentence-transformers: the transformers model inside, and a copy around another one. By names of classes:
sentence-transformers need not be there.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGE = "sentence_transformers."
_MODELS = ("BaseModel", "SentenceTransformer", "CrossEncoder")  # the former since its version 5
_HIDDEN_STATES = ("forward", "last_hidden_state")
_PARTS = {
    "StaticEmbedding": "it looks words up in a table, and has no blocks to prune",
    "Router": "it holds several models; prune each of them, and put it back",
}


def is_sentence_model(model: object) -> bool:
    """Whether this is a SentenceTransformer, a CrossEncoder, or another model of that package."""
    return any(c.__name__ in _MODELS and c.__module__.startswith(_PACKAGE) for c in type(model).__mro__)


def transformer_in(model: nn.Module, who: str) -> PreTrainedModel:
    """The transformers model of a model of sentence-transformers. ValueError where there is none, or more than one.

    who: the caller, for messages.
    """
    for name, part in model.named_modules():
        kind = next((c.__name__ for c in type(part).__mro__ if c.__name__ in _PARTS), None)
        if kind is not None and any(c.__module__.startswith(_PACKAGE) for c in type(part).__mro__):
            raise ValueError(
                f"{who}: a {type(model).__name__} must not have a {kind} module (got one at {name!r}): {_PARTS[kind]}"
            )
    found: Any = []
    for part in model.children():
        inner = getattr(part, "auto_model", None)
        if isinstance(inner, nn.Module) and any(c.__name__ == "PreTrainedModel" for c in type(inner).__mro__):
            found.append(inner)
    if len(found) != 1:
        modules = [type(part).__name__ for part in model.children()]
        raise ValueError(
            f"{who}: a {type(model).__name__} must have one module with a transformers model (got {len(found)} in "
            f"{modules})"
        )
    transformer: PreTrainedModel = found[0]
    return transformer


def around(model: Any, inner: nn.Module, new: nn.Module) -> Any:
    """A copy of `model`, of sentence-transformers, with `new` where `inner` is: prompts, pooling, model card and all.

    The card's data no longer know the trainer, which has the data sets.
    """
    card = getattr(model, "model_card_data", None)
    memo: dict[int, Any] = {id(inner): new}
    if card is not None:
        memo[id(card)] = own = copy.copy(card)
        for name in ("trainer", "model"):
            if hasattr(own, name):
                setattr(own, name, None)
    copied = copy.deepcopy(model, memo)
    leave_unread_out(copied, new)
    if card is not None and hasattr(copied.model_card_data, "register_model"):
        copied.model_card_data.register_model(copied)
    return copied.eval()


def leave_unread_out(model: nn.Module, inner: nn.Module) -> None:
    """Have the transformer `inner` of such a model not compute what the model does not read: padding, which no pooling
    and no head looks at, and where hidden states are all that is read, transformers' own pooler.
    """
    from .encoders.bert_like import rest_pooler
    from .encoders.stack import skip_padding

    skip_padding(inner)
    part = next(part for part in model.children() if getattr(part, "auto_model", None) is inner)
    ways = getattr(part, "modality_config", None) or {}  # modality -> what is called, and what of its output is read
    if ways and all((way["method"], way["method_output_name"]) == _HIDDEN_STATES for way in ways.values()):
        rest_pooler(inner)
