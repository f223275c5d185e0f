"""CamemBERT: BERT's block."""

from __future__ import annotations

from transformers.models.camembert import modeling_camembert

from .bert_like import BertLike

_family = BertLike(modeling_camembert, "Camembert", __name__, counts_from_padding=True)
(
    CompactCamembertSelfAttention,
    CompactCamembertSelfOutput,
    CompactCamembertIntermediate,
    CompactCamembertOutput,
    CompactCamembertLayer,
    CompactCamembertEncoder,
    CompactCamembertPooler,
) = _family.compact
table, blocks, rebuild = _family.table, _family.blocks, _family.rebuild
stock, most_tokens = _family.stock, _family.most_tokens
