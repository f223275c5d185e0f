"""ELECTRA: BERT's block; embeddings of another width are projected before the first."""

from __future__ import annotations

from transformers.models.electra import modeling_electra

from .bert_like import BertLike

_family = BertLike(modeling_electra, "Electra", __name__)
(
    CompactElectraSelfAttention,
    CompactElectraSelfOutput,
    CompactElectraIntermediate,
    CompactElectraOutput,
    CompactElectraLayer,
    CompactElectraEncoder,
    _,  # no pooler
) = _family.compact
table, blocks, rebuild = _family.table, _family.blocks, _family.rebuild
stock, most_tokens = _family.stock, _family.most_tokens
