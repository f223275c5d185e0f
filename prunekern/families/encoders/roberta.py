"""RoBERTa: BERT's block."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta

from .bert_like import BertLike

_family = BertLike(modeling_roberta, "Roberta", __name__, counts_from_padding=True)
(
    CompactRobertaSelfAttention,
    CompactRobertaSelfOutput,
    CompactRobertaIntermediate,
    CompactRobertaOutput,
    CompactRobertaLayer,
    CompactRobertaEncoder,
    CompactRobertaPooler,
) = _family.compact
table, blocks, rebuild = _family.table, _family.blocks, _family.rebuild
stock, most_tokens = _family.stock, _family.most_tokens
