"""Tiny random ModernBERT of every head, and the stock model that its masked and compact forms must equal; masks and
comparisons are those of `tiny_models`.

A global and a local layer, whose window of 4 tokens to each side is shorter than the sequences; heads of 6 rotary
pairs; norms, embeddings and (but for `plain`, as the published ones have none) biases are random.
"""

import copy

import torch
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)

import prunekern as pk
from tests.helpers import tiny_models
from tests.helpers.tiny_models import difference

HIDDEN, HEADS, FFN, VOCAB, PAD, WINDOW = 48, 4, 40, 50, 1, 4
HEAD_DIM = HIDDEN // HEADS
LAYERS = 2
CLASSES = {
    "base": ModernBertModel,
    "masked_lm": ModernBertForMaskedLM,
    "sequence": ModernBertForSequenceClassification,
    "token": ModernBertForTokenClassification,
    "question": ModernBertForQuestionAnswering,
    "choice": ModernBertForMultipleChoice,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}


def build(task="token", attention="sdpa", dtype=torch.float32, plain=False, seed=0, **changes):
    """A dense model in eval mode."""
    options = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": FFN, "vocab_size": VOCAB}
    options |= {"num_hidden_layers": LAYERS, "global_attn_every_n_layers": 2, "local_attention": 2 * WINDOW + 1}
    options |= {
        "max_position_embeddings": 64,
        "num_labels": 2 if task == "question" else 3,
        "pad_token_id": PAD,
        "bos_token_id": 2,
    }
    options |= {"eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "global_rope_theta": 1000.0}
    options |= {"local_rope_theta": 50.0} | ({} if plain else BIASES)
    model = CLASSES[task]._from_config(ModernBertConfig(**options | changes), attn_implementation=attention)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name:
                p.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            elif p.dim() == 2 and "embeddings" not in name:
                p.copy_(noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.5 * noise)
    model.tie_weights()
    return model.to(dtype).eval()


def names(layer=0, task="token"):
    """Module names of the seven linears of a block, once it is attached."""
    block = f"{'' if task == 'base' else 'model.'}layers.{layer}."
    attention = {part: f"{block}attn.Wqkv.{part}" for part in "qkv"} | {"o": f"{block}attn.Wo"}
    return attention | {"gate": f"{block}mlp.Wi.gate", "up": f"{block}mlp.Wi.up", "down": f"{block}mlp.Wo"}


def batch(size=4, length=13, padded=True, seed=0, task="token"):
    """input_ids and attention_mask [size, length], of multiple choice [size, 2, length]; padded on the right."""
    inputs = tiny_models.batch(size * (2 if task == "choice" else 1), length, padded, seed)
    return {n: t.view(size, 2, length) for n, t in inputs.items()} if task == "choice" else inputs


def rows_on(layer):
    """m_b [N] by the definition: queries have one logit a rotary pair (j, j + HEAD_DIM / 2) of their head."""
    if layer.mask is None or layer.mask.logits.numel() == layer.out_features:
        return tiny_models.row_on(layer)
    row = torch.arange(layer.out_features)
    pair = row // HEAD_DIM * (HEAD_DIM // 2) + row % HEAD_DIM % (HEAD_DIM // 2)
    return (layer.mask.logits > layer.mask.threshold).double()[pair]


def reference(masked):
    """See `tiny_models.reference`; the parts' rows one after the other are the fused weights of the stock model."""
    config, attention = copy.deepcopy(masked.config), masked.config._attn_implementation
    dense = type(masked)._from_config(config, attn_implementation=attention, dtype=torch.float64).double()
    adapted = {n: m for n, m in masked.named_modules() if isinstance(m, pk.nn.MaskedDoRALinear)}
    state = {}
    for name, value in masked.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in adapted and leaf == "weight":
            m = adapted[owner]
            W = value.double() + m.scale * m.B.detach().double() @ m.A.detach().double()
            W = m.magnitude.detach().double()[:, None] * W / W.norm(dim=1, keepdim=True)
            state[name] = W * rows_on(m)[:, None]
        elif owner in adapted and leaf == "bias":
            state[name] = value.double() * rows_on(adapted[owner])
        elif owner not in adapted and owner.removesuffix(".mask") not in adapted:
            state[name] = value.double()
    dense.load_state_dict(fused(state))
    dense.tie_weights()
    return dense.eval()


def fused(state):
    """Tensors of split linears by the names of the fused ones: q, k, v in Wqkv; in Wi what is activated comes first."""
    found = dict(state)
    for name in state:
        for first, rest in ((".Wqkv.q.", (".Wqkv.k.", ".Wqkv.v.")), (".Wi.gate.", (".Wi.up.",))):
            if first in name:
                parts = [found.pop(name.replace(first, part)) for part in (first, *rest)]
                found[name.replace(first, first.rpartition(".")[0].rpartition(".")[0] + ".")] = torch.cat(parts)
    return found


@torch.no_grad()
def results(model, inputs):
    """All that a head gives, one after the other: hidden states, logits, or start and end logits."""
    out = model(**inputs)
    return torch.cat(
        [out[n].flatten() for n in ("logits", "start_logits", "end_logits", "last_hidden_state") if n in out]
    )


def check(model, every, tolerance):
    """masked == stock merged by the definition, compact == masked, of all these inputs; returns the compact model."""
    small, merged = pk.compact(model), reference(model)
    for inputs in every:
        masked = results(model, inputs)
        assert difference(masked, results(merged, inputs)) <= tolerance
        assert difference(results(small, inputs), masked) <= tolerance
    return small
