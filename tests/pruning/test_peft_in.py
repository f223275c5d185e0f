"""`from_peft`: PEFT adapters as the start of pruning; what PEFT computes is the reference."""

import copy
import sys

import pytest
import torch

import prunekern as pk
from prunekern import from_peft, to_peft
from tests.helpers import tiny_models
from tests.helpers.peft_adapters import (
    FAMILIES,
    HEAD,
    PATTERNS,
    SUFFIXES,
    TOLERANCE,
    batch,
    build,
    distilbert,
    lora_layers,
    no_pruning,
    with_adapter,
)
from tests.helpers.tiny_models import attached, difference, logits, state, unchanged

peft = pytest.importorskip("peft")


# -- from PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_peft_computes_what_peft_did(family, dora, dtype):
    head = HEAD.get(family, ["score"])
    model = with_adapter(build(family, dtype=dtype), SUFFIXES[family], dora, head)
    plain = logits(build(family, dtype=dtype), batch(family))
    want = logits(model, batch(family))
    assert difference(plain, want) > 0.05  # the adapter does something
    theirs = copy.deepcopy(lora_layers(model))
    pruner = from_peft(model, pk.PruneConfig(sparsity=0.3))
    assert difference(logits(pruner.model, batch(family)), want) < TOLERANCE[dtype]
    assert type(pruner.model) is type(build(family)) and not pruner.model.training
    assert set(theirs) < set(pruner.layers) == set(pruner.table.layers)
    for name, layer in pruner.layers.items():
        assert layer.rank == layer.A.shape[0] == 3 and layer.scale == pytest.approx(5 / 3)
        if name not in theirs:
            assert not layer.B.any() and layer.A.any()  # fresh, as attach makes it
            continue
        assert torch.equal(layer.A, theirs[name].lora_A.default.weight)
        assert torch.equal(layer.B, theirs[name].lora_B.default.weight)
        if dora:
            assert torch.equal(layer.magnitude, theirs[name].lora_magnitude_vector.default.weight)
        else:
            gain = layer.gain(None).detach()
            assert float((gain - 1).abs().max()) <= 2 * torch.finfo(dtype).eps


def test_from_peft_trains_what_attach_trains():
    dense = build()
    pruner, plain = from_peft(distilbert(head=())), pk.attach(dense)
    flags = {n: p.requires_grad for n, p in dense.named_parameters()}
    assert {n: p.requires_grad for n, p in pruner.model.named_parameters()} == flags
    assert pruner.masks.keys() == plain.masks.keys() and pruner.warm
    assert not [m for m in pruner.model.modules() if type(m).__module__.startswith("peft")]


def test_from_peft_of_an_adapter_on_disk(tmp_path):
    model = distilbert(head=HEAD["distilbert"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "theirs")
    want = logits(model, batch())
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "theirs")
    assert difference(logits(from_peft(loaded).model, batch()), want) < TOLERANCE[torch.float32]


def test_rank_scale_and_dropout_are_the_adapters():
    config = pk.PruneConfig(rank=8, alpha=16, dropout=0.5, sparsity=0.3, seed=4)
    model = distilbert(r=5, lora_alpha=7, lora_dropout=0.1)
    pruner = from_peft(model, config)
    assert (pruner.config.rank, pruner.config.dropout) == (5, 0.1)
    assert pruner.config.alpha == pytest.approx(7) and (pruner.config.sparsity, pruner.config.seed) == (0.3, 4)
    assert all(layer.rank == 5 and layer.dropout.p == 0.1 for layer in pruner.layers.values())


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_rslora(dora):
    model = distilbert(dora=dora, r=4, lora_alpha=6, use_rslora=True)
    want = logits(model, batch())
    pruner = from_peft(model)
    assert pruner.config.alpha == 6 / 2 * 4 and {m.scale for m in pruner.layers.values()} == {3.0}
    assert difference(logits(pruner.model, batch()), want) < TOLERANCE[torch.float32]


def test_patterns_hold_layer_by_layer():
    model = distilbert(**PATTERNS)
    want = logits(model, batch())
    pruner = from_peft(model)
    assert difference(logits(pruner.model, batch()), want) < TOLERANCE[torch.float32]
    q, v, down, up = (tiny_models.names("distilbert", 1)[k] for k in ("q", "v", "down", "up"))
    got = {n: (pruner.layers[n].rank, pruner.layers[n].scale) for n in (q, v, down, up)}
    assert got[q] == (6, 5 / 6) and got[v] == (3, 11 / 3) and got[down] == (2, 5 / 2)
    # What most layers have, and first where they tie, is what fresh ones get.
    assert got[up] == (pruner.config.rank, pruner.config.alpha / pruner.config.rank)


def test_a_scale_that_was_changed_is_the_one_that_counts():
    model = distilbert()
    for layer in lora_layers(model).values():
        layer.set_scale("default", 0.5)
    want = logits(model, batch())
    pruner = from_peft(model)
    assert difference(logits(pruner.model, batch()), want) < TOLERANCE[torch.float32]
    assert pruner.config.alpha == pytest.approx(2.5)


def test_one_active_adapter_of_several():
    model = distilbert()
    other = peft.LoraConfig(r=2, target_modules=["k_lin", "lin2"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.set_adapter("other")
    want = logits(model, batch())
    pruner = from_peft(model)
    assert pruner.config.rank == 2
    assert difference(logits(pruner.model, batch()), want) < TOLERANCE[torch.float32]


def test_zero_rows():
    """A row of zeros outputs its bias; PEFT's LoRA does the same, its DoRA divides by zero."""
    dense = build()
    q = tiny_models.names("distilbert", 0)["q"]
    with torch.no_grad():
        dense.get_submodule(q).weight[3] = 0
    model = with_adapter(dense, dora=False)
    with torch.no_grad():
        lora_layers(model)[q].lora_B.default.weight[3] = 0
    want = logits(model, batch())
    pruner = from_peft(model)
    assert difference(logits(pruner.model, batch()), want) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match=rf"zero \(got row 3 of '{q}'\)"):
        to_peft(pruner, "never-written")


@pytest.mark.parametrize("family", ["distilbert", "llama"])
@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
def test_training_goes_on(family, dora):
    model = with_adapter(build(family), SUFFIXES[family], dora, HEAD.get(family, ["score"]))
    pruner = from_peft(model, pk.PruneConfig(sparsity=0.3, warm_steps=2, ramp_steps=2))
    inputs, labels = batch(family), torch.tensor([0, 1, 2, 1])
    before = state(pruner.model)
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-3, mask_lr=5e-2))
    losses = []
    for _ in range(6):
        pruner.model.train()
        loss = pruner.model(**inputs, labels=labels).loss + pruner.penalty()
        loss.backward()
        optimizer.step(), pruner.step(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))
    for name, p in pruner.model.named_parameters():
        assert p.requires_grad is (not torch.equal(p, before[name])), name
    report = pruner.finalize()
    assert 0.3 <= report["sparsity"] < 0.31
    want = logits(pruner.model.eval(), inputs)
    small = pk.compact(pruner.model)
    assert difference(logits(small, inputs), want) < 1e-5
    assert small.num_parameters() < build(family).num_parameters()


def test_prunekern_adapter_of_a_run_from_peft(tmp_path):
    """save_adapter and load_adapter need to know of PEFT nothing: the config says what the adapter was."""
    pruner = from_peft(distilbert(r=5, lora_alpha=7, use_rslora=True), no_pruning())
    want = logits(pruner.model, batch())
    pk.save_adapter(pruner, tmp_path / "a")
    back = pk.load_adapter(build(), tmp_path / "a")
    assert torch.equal(logits(back.model, batch()), want) and back.config == pruner.config


# -- what is refused -------------------------------------------------------------------------------------------


def refused(model, message, error=ValueError, config=None):
    """from_peft raises, and the model is as it was."""
    before, modules = state(model), dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        from_peft(model, config)
    unchanged(model, before)
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_refused_models():
    refused(build(), r"model must be a peft.PeftModel \(got DistilBertFor", TypeError)
    refused(distilbert().merge_and_unload(), "model must be a peft.PeftModel", TypeError)
    refused(distilbert(), "config must be a PruneConfig", TypeError, {"rank": 3})
    ia3 = peft.IA3Config(target_modules=["k_lin", "lin2"], feedforward_modules=["lin2"])
    refused(peft.get_peft_model(build(), ia3), r"must be LoRA or DoRA \(got IA3\)")
    prompt = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    refused(peft.get_peft_model(build("bert"), prompt), r"must be LoRA or DoRA \(got PROMPT_TUNING\)")


def test_refused_states():
    model = distilbert(dora=False)
    model.merge_adapter()
    refused(model, "is merged; call model.unmerge_adapter")
    model = distilbert()
    model.disable_adapter_layers()
    refused(model, "is disabled; call model.enable_adapter_layers")
    model = distilbert(head=())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_lin"]))
    model.base_model.set_adapter(["default", "other"])
    refused(model, r"exactly one active adapter \(got \['default', 'other'\]\)")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"bias": "all"}, r"must have bias 'none' \(got 'all'\)"),
        ({"bias": "lora_only"}, r"must have bias 'none' \(got 'lora_only'\)"),
        ({"lora_bias": True, "dora": False}, r"plain LoRA or DoRA \(got lora_bias=True\)"),
        ({"trainable_token_indices": {"word_embeddings": [1]}}, r"\(got trainable_token_indices="),
        (
            {"targets": ["q_lin", "word_embeddings"]},
            r"'distilbert.embeddings.word_embeddings' must be .* on a torch.nn.L",
        ),
        (
            {"targets": ["pre_classifier"], "head": ()},
            r"no linear of a block, which alone are pruned .*'lin1'.*got \['pre_classifier'\]",
        ),
        ({"head": ["word_embeddings"]}, r"parts of the task head \(got 'distilbert.embeddings.word_embeddings'"),
        ({"head": ["sa_layer_norm"]}, r"parts of the task head \(got 'distilbert.transformer.layer.0.sa_layer_norm'"),
        ({"r": 49}, r"rank of 'distilbert.*q_lin', \[48, 48\], must be in 1..48 \(got 49\)"),
    ],
)
def test_refused_adapters(options, message):
    refused(distilbert(**options), message)


def test_refused_other_linears():
    dense = build()
    q = dense.get_submodule(tiny_models.names("distilbert", 0)["q"])
    q.__class__ = type("Linear8bit", (torch.nn.Linear,), {})
    refused(with_adapter(dense), "must be LoRA or DoRA on a torch.nn.Linear .got .* on .*Linear8bit")
    model = distilbert()
    model.base_model.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(model, r"base model must not be quantised \(got 'bitsandbytes'\)")


def test_refused_by_the_config():
    refused(distilbert(), "which config does not adapt.*'paper'", config=pk.PruneConfig(preset="paper", sparsity=0.1))
    narrow = pk.PruneConfig(targets=["q_lin", "v_lin"], sparsity=0.1)
    refused(distilbert(), r"has 'distilbert.*lin2', which config does not adapt.*\['q_lin', 'v_lin'\]", config=narrow)
    refused(distilbert(targets=["q_lin"]), "out of reach", config=pk.PruneConfig(preset="paper", sparsity=0.9))
    gpt = with_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), ["0"], head=())
    refused(gpt, "Sequential has no family")


def test_without_peft(monkeypatch, tmp_path):
    model, pruner = distilbert(), attached(build())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="from_peft: needs PEFT; install it with `pip install peft`"):
        from_peft(model)
    with pytest.raises(ImportError, match="to_peft: needs PEFT; install it with `pip install peft`"):
        to_peft(pruner, tmp_path / "a")
