"""XLM-RoBERTa: BERT's block."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta

from .bert_like import BertLike

_family = BertLike(modeling_xlm_roberta, "XLMRoberta", __name__, counts_from_padding=True)
(
    CompactXLMRobertaSelfAttention,
    CompactXLMRobertaSelfOutput,
    CompactXLMRobertaIntermediate,
    CompactXLMRobertaOutput,
    CompactXLMRobertaLayer,
    CompactXLMRobertaEncoder,
    CompactXLMRobertaPooler,
) = _family.compact
table, blocks, rebuild = _family.table, _family.blocks, _family.rebuild
stock, most_tokens = _family.stock, _family.most_tokens
