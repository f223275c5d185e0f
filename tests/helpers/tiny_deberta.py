"""Tiny random DeBERTas; masks, references and comparisons are those of `tiny_models`."""

import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)

import prunekern as pk
from prunekern.families.encoders import deberta_attention
from tests.helpers.tiny_models import FFN, HEADS, HIDDEN, LAYERS, VOCAB, attached, prune

PAD = 0
CLASSES = {
    "base": DebertaV2Model,
    "sequence": DebertaV2ForSequenceClassification,
    "token": DebertaV2ForTokenClassification,
    "masked_lm": DebertaV2ForMaskedLM,
    "question": DebertaV2ForQuestionAnswering,
    "choice": DebertaV2ForMultipleChoice,
}
# As the published v3 models are, but for sizes: 8 buckets, of distances up to 20.
V3 = {
    "relative_attention": True, "position_buckets": 8, "max_relative_positions": -1, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
# Each a dict of changes; "plain" has no relative positions at all.
VARIANTS = {
    "v3": {},
    "v2 with convolution": {"conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2},
    "no buckets": {"position_buckets": -1, "norm_rel_ebd": "none"},
    "c2p": {"pos_att_type": ["c2p"]},
    "p2c": {"pos_att_type": "p2c"},
    "no terms": {"pos_att_type": []},
    "plain": {"relative_attention": False, "position_biased_input": True},
    "keys of positions": {"share_att_key": False, "pos_att_type": ["c2p"]},
    "queries of positions": {"share_att_key": False, "pos_att_type": ["p2c"]},
}


def config(variant="v3", layers=LAYERS, **changes):
    options = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": FFN}
    options |= {"num_hidden_layers": layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options |= {"vocab_size": VOCAB, "max_position_embeddings": 20, "num_labels": 3, "pad_token_id": PAD}
    return DebertaV2Config(**options | V3 | VARIANTS[variant] | changes)


def build(variant="v3", task="sequence", dtype=torch.float32, layers=LAYERS, seed=0, **changes):
    """A dense model in eval mode; weights, biases and norms are random, a padding token's embedding is zero."""
    if task == "question":
        changes = {"num_labels": 2} | changes
    model = CLASSES[task](config(variant, layers, **changes))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "LayerNorm" in name:
                p.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            elif p.dim() >= 2 and "embedding" not in name:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.5 * noise)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.tie_weights()
    return model.to(dtype).eval()


def names(layer=0, task="sequence"):
    """Module names of the six linears of a block, written out: {"q": ..., "k", "v", "o", "up", "down"}."""
    block = f"{'' if task == 'base' else 'deberta.'}encoder.layer.{layer}."
    parts = {"q": "attention.self.query_proj", "k": "attention.self.key_proj", "v": "attention.self.value_proj"}
    parts |= {"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    return {short: block + part for short, part in parts.items()}


def batch(size=4, length=9, padded=True, seed=0, task="sequence"):
    """input_ids and attention_mask; padded: rows of different lengths, the first one full, one with a hole."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (size, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(size):
            keep = length if row == 0 and size > 1 else max(2, length - 1 - row % max(length - 2, 1))
            mask[row, keep:] = 0
        if size > 2 and length > 4:
            mask[2, 1] = 0
        ids[mask == 0] = PAD
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {k: t.view(-1, 2, length) for k, t in inputs.items()} if task == "choice" else inputs


def compact(variant="v3", task="sequence", share=0.5, dtype=torch.float32, **changes):
    """A compact model of which about `share` is gone."""
    model = build(variant, task, dtype, **changes)
    prune(attached(model), share)
    return pk.compact(model)


def watch_ragged(monkeypatch):
    """Arguments of every attention that runs on ragged heads, in order."""
    calls = []
    real = deberta_attention.disentangled_attention

    def spy(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(deberta_attention, "disentangled_attention", spy)
    return calls
