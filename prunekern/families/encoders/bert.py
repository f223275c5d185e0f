"""BERT."""

from __future__ import annotations

from transformers.models.bert import modeling_bert

from .. import types_in
from .bert_like import BertLike

MODEL_TYPES = (*types_in("encoders.bert"), *types_in("encoders.roberta"))  # as it was when both were here
_family = BertLike(modeling_bert, "Bert", __name__)
(
    CompactBertSelfAttention,
    CompactBertSelfOutput,
    CompactBertIntermediate,
    CompactBertOutput,
    CompactBertLayer,
    CompactBertEncoder,
    CompactBertPooler,
) = _family.compact
table, blocks, rebuild = _family.table, _family.blocks, _family.rebuild
stock, most_tokens = _family.stock, _family.most_tokens


def __getattr__(name: str) -> object:
    if name.startswith("CompactRoberta"):  # RoBERTa's were here once: pickles ask for them here
        from . import roberta

        return getattr(roberta, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
