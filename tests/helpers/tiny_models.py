"""Tiny random encoders of every family, and the definition-level reference their masked and compact forms must equal.

Weights, biases and LayerNorms are all random: a dropped bias or a skipped LayerNorm then shows.
"""

import copy
import sys

import numpy as np
import torch
import transformers

import prunekern as pk
from prunekern.families.encoders import step as encoder_step

torch.set_num_threads(1)

HIDDEN, HEADS, FFN, VOCAB, PAD = 48, 4, 96, 50, 1
LAYERS = 2
HEAD_DIM = HIDDEN // HEADS
FAMILIES = ("distilbert", "bert", "roberta")
# As BERT is, or close to it: tested where they differ (tests/families/encoders/test_relatives.py).
RELATIVES = ("xlm-roberta", "camembert", "electra", "mpnet")
TASKS = ("sequence", "token", "masked_lm")
PREFIXES = {
    "distilbert": "DistilBert",
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "mpnet": "MPNet",
}
HEADS_OF = {
    "base": "Model",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "masked_lm": "ForMaskedLM",
    "question": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
CLASSES = {
    **{(f, t): getattr(transformers, f"{p}{head}") for f, p in PREFIXES.items() for t, head in HEADS_OF.items()},
    ("bert", "pretraining"): transformers.BertForPreTraining,
    ("bert", "next_sentence"): transformers.BertForNextSentencePrediction,
    ("electra", "pretraining"): transformers.ElectraForPreTraining,
}


def config(family, layers=2, **changes):
    if family == "distilbert":
        options = {"dim": HIDDEN, "n_heads": HEADS, "hidden_dim": FFN, "n_layers": layers, "dropout": 0.0}
        options |= {"attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    else:
        options = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": FFN}
        options |= {"num_hidden_layers": layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "electra":
        options |= {"embedding_size": HIDDEN // 2, "summary_last_dropout": 0.0}
    options |= {"vocab_size": VOCAB, "max_position_embeddings": 40, "num_labels": 3, "pad_token_id": PAD}
    return getattr(transformers, f"{PREFIXES[family]}Config")(**options | changes)


def build(
    family="distilbert", task="sequence", attention="sdpa", dtype=torch.float32, layers=LAYERS, seed=0, **changes
):
    """A dense model in eval mode. Of MPNet transformers has one kind of attention."""
    attention = "eager" if family == "mpnet" else attention
    changes = {"num_labels": 2} | changes if task == "question" else changes  # start and end
    model = CLASSES[family, task]._from_config(config(family, layers, **changes), attn_implementation=attention)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "LayerNorm" in name or "layer_norm" in name:
                p.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            elif p.dim() == 2 and "embedding" not in name:
                p.copy_(noise / p.shape[1] ** 0.5)
            else:
                p.copy_(0.5 * noise)
        for module in model.modules():  # the padding token's embedding is zero, as trained ones are
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.tie_weights()
    return model.to(dtype).eval()


def names(family, layer=0, task="sequence"):
    """Module names of the six linears of a block, written out: {"q": ..., "k": ..., "v", "o", "up", "down"}."""
    prefix = "" if task == "base" else f"{CLASSES[family, task].base_model_prefix}."
    if family == "distilbert":
        block = f"{prefix}transformer.layer.{layer}."
        parts = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
    else:
        block = f"{prefix}encoder.layer.{layer}."
        attention = ("attn.q", "attn.k", "attn.v", "attn.o")
        if family != "mpnet":
            attention = ("self.query", "self.key", "self.value", "output.dense")
        parts = (*(f"attention.{part}" for part in attention), "intermediate.dense", "output.dense")
    return dict(zip(("q", "k", "v", "o", "up", "down"), (block + p for p in parts), strict=True))


def batch(size=4, length=9, padded=True, seed=0):
    """input_ids and attention_mask; padded: rows of different lengths, the first one full."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (size, length), generator=g)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(size):
            keep = length if row == 0 and size > 1 else max(2, length - 1 - row % (length - 2))
            mask[row, keep:] = 0
        ids[mask == 0] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def attached(model, seed=0, **options):
    """`pk.attach` with adapters as after training: B, magnitudes and logits random."""
    pruner = pk.attach(model, pk.PruneConfig(**{"rank": 4, "sparsity": 0.1, "seed": seed, "warm_steps": 0} | options))
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in pruner.layers.values():
            layer.B.copy_(0.5 * torch.randn(layer.B.shape, generator=g) / layer.in_features**0.5)
            layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=g))
            layer.refresh()  # as Pruner.step does
        for mask in pruner.masks.values():
            mask.logits.copy_(torch.randn(mask.logits.shape, generator=g))
    return pruner


def prune(pruner, share, seed=0):
    """Give every mask random logits of which about `share` (0 and 1: exactly) lie below the threshold."""
    rng = np.random.default_rng(seed)
    kept = {name: rng.random(mask.logits.numel()) >= share for name, mask in pruner.masks.items()}
    return keep_only(pruner, kept)


def keep_only(pruner, kept):
    """kept: bool arrays by carrier; masks not named keep everything."""
    with torch.no_grad():
        for name, mask in pruner.masks.items():
            on = torch.as_tensor(np.asarray(kept.get(name, np.ones(mask.logits.numel(), bool))))
            mask.logits.copy_(torch.where(on, 1.0, -1.0).to(mask.logits))
    return pruner


def reference(masked, on=None, attention=None):
    """The masked model as a stock transformers model in float64: every adapted linear merged by the definition.

    W = m_b m (V + s B A) / ||V + s B A|| and m_b b, with m_b = logit > threshold: neither ops nor plan are used.
    on: m_b [N] of a layer, where its groups are not its rows. attention: another implementation than the model's.
    """
    on = row_on if on is None else on
    dense = (
        type(masked)
        ._from_config(
            copy.deepcopy(masked.config),
            attn_implementation=attention or masked.config._attn_implementation,
            dtype=torch.float64,
        )
        .double()
    )
    state = {}
    adapted = {n: m for n, m in masked.named_modules() if isinstance(m, pk.nn.MaskedDoRALinear)}
    for name, value in masked.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in adapted and owner.removesuffix(".mask") not in adapted:
            state[name] = value.double()
        elif leaf == "weight":
            m = adapted[owner]
            W = value.double() + m.scale * m.B.detach().double() @ m.A.detach().double()
            W = m.magnitude.detach().double()[:, None] * W / W.norm(dim=1, keepdim=True)
            state[name] = W * on(m)[:, None]
        elif leaf == "bias":
            state[name] = value.double() * on(adapted[owner])
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert not unexpected and not [n for n in missing if "position_ids" not in n], (missing, unexpected)
    dense.tie_weights()
    return dense.eval()


def row_on(layer):
    if layer.mask is None:
        return torch.ones(layer.out_features, dtype=torch.float64)
    return (layer.mask.logits > layer.mask.threshold).double()


@torch.no_grad()
def logits(model, inputs):
    """All answers of the model's head as one tensor; hidden states of a model without one."""
    out = model(**inputs)
    answers = [value for name, value in out.items() if name.endswith("logits")] or [out.last_hidden_state]
    return answers[0] if len(answers) == 1 else torch.cat([a.flatten(1) for a in answers], 1)


def difference(got, want):
    """max |difference| relative to max |value|; infinite where one is not finite."""
    assert got.shape == want.shape
    if not (torch.isfinite(got).all() and torch.isfinite(want).all()):
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def state(model):
    """Every parameter and buffer, cloned: to compare a model with itself later."""
    return {n: t.detach().clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def unchanged(model, before):
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == before.keys()
    assert all(torch.equal(now[n], t) for n, t in before.items())


def watch(monkeypatch) -> list[str]:
    """Names of the ops that compact models call, in order; those with weights count when these are packed, and blocks
    that are one call as one.
    """
    calls = []

    def spy(module, name):
        real = getattr(module, name)

        def call(x, weight, *args, **kwargs):
            if name == "compact_attention" or weight.dim() == 3:
                calls.append(name)
            return real(x, weight, *args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module in ("compact_linear", "compact_attention", "compact_mlp"):
        nn_module = sys.modules[f"prunekern.nn.{module}"]
        spy(nn_module, module)
        if module == "compact_attention":
            spy(nn_module, "compact_linear")
    real = encoder_step._RUN

    def whole(*args):
        y = real(*args)
        if y is not None:
            calls.extend(["encoder_block"] * len(args[-1]))  # one for each block of the call
        return y

    monkeypatch.setattr(encoder_step, "_RUN", whole if real is not None else None)
    return calls
