"""Models of real shapes with random weights, ragged plans of them, and inputs: what speed is measured on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import prunekern as pk

MODELS = {
    "DistilBERT-base": lambda: DistilBertForSequenceClassification(DistilBertConfig()),
    "RoBERTa-base": lambda: RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514)),
}
# Encoders of other kinds: models that cannot be sliced plainly (bench/common/sliced.py knows blocks like BERT's), so
# that peers run the dense model only. The vocabulary of DeBERTa is smaller than it is: no product reads it.
OTHERS = {
    "DeBERTa-v3-base": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=30_000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            relative_attention=True, position_buckets=256, max_relative_positions=-1, share_att_key=True,
            norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
            layer_norm_eps=1e-7,
        )
    ),
    "ModernBERT-base": lambda: ModernBertForSequenceClassification(ModernBertConfig(vocab_size=50_368)),
}  # fmt: skip
# For trying a script out.
TINY = {
    "DistilBERT tiny": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=30_000, dim=64, hidden_dim=96, n_layers=2, n_heads=4)
    )
}
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}  # fmt: skip


def dense_model(name: str) -> nn.Module:
    """The model with random weights, biases too (a fresh model's are zero: removing the wrong one would not show)."""
    torch.manual_seed(0)
    model = (MODELS | OTHERS | TINY)[name]().eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.normal_(0, 0.02)
    return model


def ragged(dense: nn.Module, share: float, cost: str = "params", align: int = 1) -> tuple[nn.Module, pk.Plan]:
    """(compact model, its plan) with `share` of the block linears' cost removed; `dense` is left alone."""
    attached = copy.deepcopy(dense)
    pruner = pk.attach(attached, pk.PruneConfig(sparsity=share, cost=cost, align=align))
    generator = torch.Generator().manual_seed(0)
    for mask in pruner.masks.values():
        level = 0.3 * torch.randn((), generator=generator)
        mask.logits.data = level + torch.randn(mask.logits.shape, generator=generator)
    pruner.finalize()
    return pk.compact(attached), pruner.plan()


def inputs(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids [batch, tokens] and a mask of ones."""
    ids = torch.randint(5, 30000, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids)
