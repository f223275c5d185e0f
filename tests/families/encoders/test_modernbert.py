"""ModernBERT: masked == compact == stock merged by the definition; what is called, and what a block goes without."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import prunekern as pk
from prunekern import families
from prunekern.families.encoders import prenorm_step as step
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_models import attached, difference, prune, state, unchanged, watch
from tests.helpers.tiny_modernbert import (
    CLASSES,
    FFN,
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    batch,
    build,
    check,
    names,
    results,
)

BOTH = ((torch.float64, F64), (torch.float32, F32))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_compact_equals_masked_equals_merged(share, attention):
    """Sequences longer than the window (13 tokens, 4 to each side) and shorter, padded and not, biases and none."""
    for (dtype, tolerance), plain in zip(BOTH, (attention == "sdpa", attention == "eager"), strict=True):
        model = build("token", attention, dtype, plain)
        prune(attached(model), share)
        check(model, (batch(), batch(1, padded=False), batch(3, 5)), tolerance)


@pytest.mark.parametrize("task", CLASSES)
def test_every_head(task):
    for dtype, tolerance in BOTH:
        model = build(task, dtype=dtype)
        prune(attached(model), 0.4)
        small = check(model, [batch(task=task)], tolerance)
        assert type(small) is type(model) and not any(p.requires_grad for p in small.parameters())


def test_attach_leaves_the_outputs_and_gives_linears_of_their_own():
    model = build(dtype=torch.float64)
    before = results(model, batch())
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.3))
    assert difference(results(model, batch()), before) <= 1e-12
    every = [n for layer in range(LAYERS) for n in names(layer).values()]
    assert sorted(pruner.layers) == sorted(every)
    masked = {n for layer in range(LAYERS) for part, n in names(layer).items() if part in ("q", "v", "o", "up", "down")}
    assert set(pruner.masks) == masked
    for layer in range(LAYERS):
        n = names(layer)
        for whole, parts in (("attn.Wqkv", "qkv"), ("mlp.Wi", ("gate", "up"))):
            for leaf in ("weight", "bias"):
                joined = torch.cat([getattr(pruner.layers[n[part]], leaf) for part in parts])
                assert torch.equal(joined, dense[f"model.layers.{layer}.{whole}.{leaf}"])
    assert pruner.masks[names()["q"]].logits.numel() == HIDDEN // 2  # a logit a rotary pair


def test_groups():
    """Rotary pairs of a head in q and k, value channels with columns of o, up with gate and columns of down."""
    model = build()
    families.split(model)
    families.split(model)  # again: nothing
    table, n = families.of(model).table(model), names()
    q = table.groups[n["q"]]
    assert q.rows[HEAD_DIM // 2 + 1].tolist() == [HEAD_DIM + 1, HEAD_DIM + 1 + HEAD_DIM // 2]
    assert torch.equal(q.removed_rows[n["k"]], q.rows) and q.lives_by == n["v"]
    assert [*table.groups[n["v"]].removed_cols] == [n["o"]]
    assert [*table.groups[n["up"]].removed_rows] == [n["gate"]]
    assert [*table.groups[n["up"]].removed_cols] == [n["down"]]
    layer = table.layers[n["up"]]
    assert (layer.rows, layer.cols, layer.bias) == (FFN, HIDDEN, True)


# -- how it runs -----------------------------------------------------------------------------------------------


def test_positions_inputs_embeds_and_tuples():
    model = build("sequence", dtype=torch.float64, classifier_pooling="mean")
    prune(attached(model), 0.5)
    small = pk.compact(model)
    g = torch.Generator().manual_seed(1)
    inputs = {"inputs_embeds": torch.randn(2, 11, HIDDEN, dtype=torch.float64, generator=g)}
    inputs["position_ids"] = torch.randint(0, 60, (2, 11), generator=g)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        got, want = (m(**inputs, labels=labels, return_dict=False) for m in (small, model))
    assert isinstance(got, tuple) and difference(got[1], want[1]) <= F64
    assert abs(float(got[0] - want[0])) < 1e-10


def test_hooks_are_heard_and_change_what_is_computed():
    model = build()
    prune(attached(model), 0.4)
    small = pk.compact(model)
    before = results(small, batch())
    for layer in range(LAYERS):
        for name in (*names(layer).values(), f"model.layers.{layer}.mlp", f"model.layers.{layer}.attn"):
            heard = []
            handle = small.get_submodule(name).register_forward_hook(lambda m, args, out, heard=heard: heard.append(1))
            assert difference(results(small, batch()), before) <= 1e-5 and heard == [1], name
            handle.remove()
    handle = small.get_submodule(names(1)["gate"]).register_forward_hook(lambda m, args, out: out * 0)
    assert difference(results(small, batch()), before) > 1e-3
    handle.remove()
    assert torch.equal(results(small, batch()), before)


def test_attention_can_be_switched_after_compaction():
    model = build(dtype=torch.float64)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    want = results(small, batch())
    small.set_attn_implementation("eager")
    real = batch()["attention_mask"].bool()[:, :, None].expand(4, 13, 3).flatten()  # a padded one sees nothing near
    assert difference(results(small, batch())[real], want[real]) <= 1e-6  # eager's softmax is in float32


def test_another_mask_than_of_near_keys_is_honoured():
    """Packed sequences say by a mask of their own who sees whom."""
    for dtype, tolerance in BOTH:
        model = build(dtype=dtype)
        prune(attached(model), 0.3)
        small = pk.compact(model)
        inputs = batch(2, padded=False)
        apart = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril(2).triu(-7)
        inputs["attention_mask"] = {"full_attention": apart, "sliding_attention": apart.transpose(2, 3)}
        assert difference(results(small, inputs), results(model, inputs)) <= tolerance
        near = batch(2, padded=False)
        assert difference(results(small, near), results(small, inputs)) > 1e-3


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_few_bits_stay_near(weights, tmp_path):
    model = build()
    prune(attached(model), 0.3)
    pk.save(pk.compact(model), tmp_path / "m")
    want = results(pk.load(tmp_path / "m"), batch())
    got = results(pk.load(tmp_path / "m", weights=weights), batch())
    assert 1e-6 < difference(got, want) < 0.06


def test_gradient_checkpointing_and_training_of_the_masked_model():
    model = build("sequence", attention_dropout=0.1, mlp_dropout=0.1, embedding_dropout=0.1)
    pruner = attached(model)
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append({n: layer.B.grad.clone() for n, layer in pruner.layers.items()})
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0 and torch.allclose(grad, grads[1][name], rtol=1e-4, atol=1e-7), name


def test_shrunk_in_training_equals_what_it_was():
    model = build(dtype=torch.float64)
    pruner = prune(attached(model), 0.5)
    pruner.finalize()
    pruner.shrink()
    want = results(pk.compact(model), batch())
    assert difference(results(model, batch()), want) <= F64
    model.train()
    model(**batch(), labels=torch.zeros(4, 13, dtype=torch.long)).loss.backward()
    assert all(layer.B.grad is not None for layer in pruner.layers.values())


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"hidden_activation": "sigmoid"}, "activation must be zero at zero"),
        ({"hidden_size": 20, "num_attention_heads": 4}, "rotary pair .*heads of 5 channels"),
    ],
)
def test_refused_configs_leave_the_model_as_it_was(changes, match):
    model = build(**changes)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        pk.attach(model)
    unchanged(model, before)


def test_refused_attach_puts_the_fused_linears_back():
    model = build()
    before, modules = state(model), dict(model.named_modules())
    for config in ({"rank": 400}, {"targets": ["Wqkv"]}, {"sparsity": 0.99, "preset": "paper"}):
        with pytest.raises(ValueError, match="PruneConfig"):
            pk.attach(model, pk.PruneConfig(**config))
        unchanged(model, before)
        assert all(modules[n] is m for n, m in model.named_modules())
    model.model.layers[0].attn.Wqkv = torch.nn.Sequential(model.model.layers[0].attn.Wqkv)
    with pytest.raises(ValueError, match=r"'model.layers.0.attn.Wqkv' must be a torch.nn.Linear"):
        pk.attach(model)


def test_runs_on_the_kernels(monkeypatch):
    """By parts; `test_modernbert_step` counts blocks that are one call."""
    model = build()
    prune(attached(model), 0.4)
    small = pk.compact(model)
    monkeypatch.setattr(step, "_RUN", None)
    calls = watch(monkeypatch)
    results(small, batch())
    assert calls == ["compact_linear", "compact_attention", "compact_linear", "compact_mlp"] * LAYERS


AUTO = {
    "base": AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "choice": AutoModelForMultipleChoice,
}


@pytest.mark.parametrize("task", CLASSES)
def test_save_and_load_in_every_auto_class(task, tmp_path):
    model, inputs = build(task), batch(task=task)
    prune(attached(model), 0.4)
    small = pk.compact(model)
    want = results(small, inputs)
    pk.save(small, tmp_path / "m")
    back = pk.load(tmp_path / "m")
    assert type(back) is type(model) and torch.equal(results(back, inputs), want)
    assert pk.plan(back) == pk.plan(small) == pk.plan(model)
    import prunekern.hf  # noqa: F401

    auto = AUTO[task].from_pretrained(tmp_path / "m").eval()
    assert type(auto) is type(model) and torch.equal(results(auto, inputs), want)
    if task == "masked_lm":
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
        bare = AutoModel.from_pretrained(tmp_path / "m").eval()
        assert torch.equal(results(bare, inputs), results(back.model, inputs))
