"""Tiny random decoders of every family; masks, references and comparisons are those of `tiny_models`.

Three query heads share a key/value head; biases, norms and embeddings are random.
"""

import torch
import transformers

from tests.helpers.tiny_models import reference as merged
from tests.helpers.tiny_models import row_on

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, PAD = 72, 6, 2, 12, 96, 61, 0
MANY_HEADS = {"num_attention_heads": 10, "num_key_value_heads": 5}  # enough that heads against FFN is a choice
LAYERS = 2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TASKS = {
    "causal": "ForCausalLM",
    "base": "Model",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "question": "ForQuestionAnswering",
}
_NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3")
CLASSES = {
    (name.lower(), task): (getattr(transformers, f"{name}Config"), getattr(transformers, name + end))
    for name in _NAMES
    for task, end in TASKS.items()
}


def build(family="llama", task="causal", attention="sdpa", dtype=torch.float32, layers=LAYERS, seed=0, **changes):
    """A dense model in eval mode."""
    config_class, model_class = CLASSES[family, task]
    options = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "vocab_size": VOCAB}
    options |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    options |= {"max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    options |= {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    options |= {"attention_bias": True} if family == "qwen3" else {}
    options |= {"sliding_window": None} if family == "mistral" else {}
    if task in ("sequence", "token"):
        options["num_labels"] = 3
    model = model_class._from_config(config_class(**options | changes), attn_implementation=attention)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise)
            elif p.dim() == 2 and "embed" not in name:
                p.copy_(noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.5 * noise)
    model.tie_weights()
    return model.to(dtype).eval()


def names(layer=0, task="causal"):
    """Module names of the seven linears of a block: {"q": ..., "k", "v", "o", "gate", "up", "down"}."""
    block = f"{'' if task == 'base' else 'model.'}layers.{layer}."
    attention = {k: f"{block}self_attn.{k}_proj" for k in "qkvo"}
    return attention | {k: f"{block}mlp.{k}_proj" for k in ("gate", "up", "down")}


def batch(size=4, length=9, padded=True, seed=0):
    """input_ids and attention_mask; padded: on the left, rows of different lengths, the first one full."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, size):
            mask[row, : row % (length - 2) + 1] = 0
        ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def reference(masked):
    """See `tiny_models.reference`; queries have one logit a rotary pair and key/value head. Attention is "sdpa": in
    float64, "eager" of transformers gives NaN for queries that see no key.
    """

    def on(layer):
        if layer.mask is None or layer.mask.logits.numel() == layer.out_features:
            return row_on(layer)
        row = torch.arange(layer.out_features)
        half, shared = HEAD_DIM // 2, HEADS // KV_HEADS
        pair = row // HEAD_DIM // shared * half + row % HEAD_DIM % half
        return (layer.mask.logits > layer.mask.threshold).double()[pair]

    return merged(masked, on, "sdpa")
