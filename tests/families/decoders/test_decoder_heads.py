"""Decoders as embedding models and classifiers: the base model alone, and heads for sequences, tokens and answers."""

import pytest
import torch
import transformers

import prunekern as pk
import prunekern.hf  # noqa: F401  (registers the format)
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_decoders import FAMILIES, LAYERS, batch, build, reference
from tests.helpers.tiny_models import attached, difference, prune, watch

AUTO = {
    "base": transformers.AutoModel,
    "sequence": transformers.AutoModelForSequenceClassification,
    "token": transformers.AutoModelForTokenClassification,
    "question": transformers.AutoModelForQuestionAnswering,
}
TRAINED = {
    "base": set(),
    "sequence": {"score.weight"},
    "token": {"score.weight", "score.bias"},
    "question": {"qa_outputs.weight", "qa_outputs.bias"},
}


def padded(side):
    inputs = batch(3, 8)
    return inputs if side == "left" else {name: t.flip(1) for name, t in inputs.items()}


@torch.no_grad()
def answers(model, inputs, **kwargs):
    """What the model says, padding left out; of a base model, hidden states."""
    out, keep = model(**inputs, **kwargs), inputs["attention_mask"].bool()
    if "start_logits" in out:
        return torch.stack([out.start_logits[keep], out.end_logits[keep]])
    found = out.last_hidden_state if "last_hidden_state" in out else out.logits
    return found[keep] if found.dim() == 3 else found


def embeddings(model, inputs, pooling):
    """As sentence encoders pool: the last token that is no padding, or the mean of those that are none; of length 1."""
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
    if pooling == "mean":
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    else:
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        pooled = hidden[torch.arange(len(hidden)), last]
    return torch.nn.functional.normalize(pooled, dim=-1)


def loss_of(model, head, inputs):
    labels = torch.arange(len(inputs["input_ids"])) % 3
    if head == "base":
        found = embeddings(model, inputs, "last")
        return torch.nn.functional.cross_entropy(found @ embeddings(model, inputs, "mean").T, labels)
    if head == "question":
        return model(**inputs, start_positions=labels + 4, end_positions=labels + 5).loss
    return model(**inputs, labels=labels if head == "sequence" else inputs["input_ids"] % 3).loss


@pytest.mark.parametrize("family, head", [
    *((family, head) for family in FAMILIES for head in ("base", "sequence")),
    ("llama", "token"), ("qwen3", "token"), ("mistral", "question"), ("qwen2", "question"),
])  # fmt: skip
def test_compact_equals_masked(family, head, monkeypatch):
    for dtype, tolerance, share in ((torch.float64, F64, 0.5), (torch.float64, F64, 1.0), (torch.float32, F32, 0.5)):
        model = build(family, head, dtype=dtype)
        prune(attached(model), share, seed=3)
        small, exact = pk.compact(model), reference(model)
        assert type(small) is type(model)
        calls = watch(monkeypatch)
        for side in ("left", "right"):
            want = answers(model, padded(side))
            assert difference(want, answers(exact, padded(side))) <= tolerance
            assert difference(answers(small, padded(side)), want) <= tolerance
        runs = calls.count("compact_attention")
        assert runs == (2 * LAYERS if share < 1 and dtype == torch.float32 else 0), "heads must run ragged"
        monkeypatch.undo()


@pytest.mark.parametrize("pooling", ("last", "mean"))
@pytest.mark.parametrize("family", ("mistral", "qwen3"))
def test_embeddings(family, pooling):
    """And padding, left or right, changes none."""
    model = build(family, "base")
    prune(attached(model), 0.4, seed=3)
    small = pk.compact(model)
    inputs = padded("left")
    with torch.no_grad():
        want, got = (embeddings(m, inputs, pooling) for m in (model, small))
        assert difference(got, want) <= F32
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            ids = inputs["input_ids"][row][mask][None]
            for tail in (0, 3):
                right = {
                    "input_ids": torch.nn.functional.pad(ids, (0, tail), value=5),
                    "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, tail)),
                }
                assert difference(embeddings(small, right, pooling)[0], got[row]) <= F32


@pytest.mark.parametrize("family, head", [("qwen3", "base"), ("llama", "sequence"), ("mistral", "token"),
                                          ("qwen2", "question")])  # fmt: skip
def test_trained_a_step_and_stored(family, head, tmp_path):
    model = build(family, head)
    pruner = attached(model, sparsity=0.3)
    pruner.step()
    optimizer = torch.optim.SGD(pruner.param_groups(1e-2, 1e-2))
    model.train()
    loss_of(model, head, padded("left")).backward()
    own = (".A", ".B", ".magnitude", ".logits")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    assert {n for n in trained if not n.endswith(own)} == TRAINED[head]
    optimizer.step()
    pruner.step()
    pruner.finalize()
    small = pk.compact(model.eval())
    for side in ("left", "right"):
        assert difference(answers(small, padded(side)), answers(model, padded(side))) <= F32
    inputs = padded("right")
    pk.save(small, tmp_path / "m")
    for again in (pk.load(tmp_path / "m"), AUTO[head].from_pretrained(tmp_path / "m")):
        assert type(again).__name__ == type(model).__name__
        assert torch.equal(answers(again, inputs), answers(small, inputs))
    int8 = answers(pk.load(tmp_path / "m", weights="int8"), inputs)
    assert F32 < difference(int8, answers(small, inputs)) < 0.1
    pk.calibrate(small, [inputs], weights="int8", most_rows=16)
    pk.save(small, tmp_path / "few", weights="int8")
    few = answers(pk.load(tmp_path / "few"), inputs)
    assert difference(few, answers(small, inputs)) < 0.05  # embeddings are stored in bf16


@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_heads_come_and_go_on_disk(family, tmp_path):
    """A compact base model under a new head, and the base model out of a compact classifier."""
    base, classifier = (build(family, head) for head in ("base", "sequence"))
    for model in (base, classifier):
        prune(attached(model), 0.5, seed=4)
    small, whole = pk.compact(base), pk.compact(classifier)
    pk.save(small, tmp_path / "base")
    pk.save(whole, tmp_path / "whole")
    inputs = padded("left")
    under = AUTO["sequence"].from_pretrained(tmp_path / "base", num_labels=3)
    assert difference(answers(under.model, inputs), answers(small, inputs)) <= F32
    alone = AUTO["base"].from_pretrained(tmp_path / "whole")
    assert difference(answers(alone, inputs), answers(whole.model, inputs)) <= F32


def test_answers_of_another_base_are_refused(tmp_path):
    """transformers calls the base of these models "transformer", and finds no weights for one called "model"."""
    model = build("llama", "question")
    prune(attached(model), 0.5)
    pk.save(pk.compact(model), tmp_path)
    with pytest.raises(ValueError, match="layer 'layers.0.* is not in the plan"):
        AUTO["base"].from_pretrained(tmp_path)


# -- decoders as encoders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_sees_all_where_the_config_says_so(family, attention, monkeypatch):
    """`is_causal` False, as embedding models made of decoders have it: later tokens are read, padding is not."""
    model = build(family, "base", attention, is_causal=False)
    prune(attached(model), 0.5, seed=3)
    small = pk.compact(model)
    for inputs in (batch(2, padded=False), padded("left"), padded("right")):
        calls = watch(monkeypatch)
        got = answers(small, inputs)
        assert calls.count("compact_attention") == (LAYERS if attention == "sdpa" else 0)
        monkeypatch.undo()
        assert difference(got, answers(model, inputs)) <= F32
        later = inputs | {"input_ids": inputs["input_ids"].clone()}
        last = int(inputs["attention_mask"][0].sum()) - 1
        later["input_ids"][0, last] = 5 + (later["input_ids"][0, last] == 5)
        assert difference(answers(small, later)[:last], got[:last]) > 1e-3


def test_every_token_sees_all_where_the_call_says_so():
    inputs = batch(2, padded=False)
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build("qwen2", "base", dtype=dtype)
        prune(attached(model), 0.5, seed=3)
        small = pk.compact(model)
        for kwargs in ({"is_causal": False}, {"is_causal": True}, {}):
            assert difference(answers(small, inputs, **kwargs), answers(model, inputs, **kwargs)) <= tolerance
    assert difference(answers(small, inputs, is_causal=False), answers(small, inputs)) > 1e-3


def test_tokens_after_a_cache_are_not_taken_for_causal_ones():
    """Three tokens after a cache, of which the first sees the others where nothing is causal."""
    model = build("llama", "base", is_causal=False)
    prune(attached(model), 0.3, seed=3)
    small, ids = pk.compact(model), batch(1, 8, padded=False)["input_ids"]

    @torch.no_grad()
    def tail(one):
        past = one(input_ids=ids[:, :5], use_cache=True).past_key_values
        return one(input_ids=ids[:, 5:], past_key_values=past).last_hidden_state

    assert difference(tail(small), tail(model)) <= F32
