"""attach: what trains, the paper's counts to the unit, and refusals that leave the model as it was."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import prunekern as pk
from prunekern.ops import narrow
from prunekern.pruning import attach as attach_file
from tests.helpers.tiny_models import (
    FAMILIES,
    FFN,
    HIDDEN,
    TASKS,
    attached,
    batch,
    build,
    difference,
    logits,
    names,
    state,
    unchanged,
)

# -- counts ----------------------------------------------------------------------------------------------------


def meta(cls, config):
    with torch.device("meta"):
        return cls(config)


@pytest.mark.parametrize(
    "build_model,blocks,low_rank,with_magnitudes,with_masks",
    [
        (lambda: meta(DistilBertForSequenceClassification, DistilBertConfig()), 6, 147_456, 156_672, 165_888),
        (lambda: meta(RobertaForSequenceClassification, RobertaConfig()), 12, 294_912, 313_344, 331_776),
        (lambda: meta(BertForSequenceClassification, BertConfig()), 12, 294_912, 313_344, 331_776),
    ],
    ids=["distilbert-base", "roberta-base", "bert-base"],
)
def test_trainable_parameters_of_the_paper(build_model, blocks, low_rank, with_magnitudes, with_masks):
    """Table of the paper, task head aside: rank 8 on the query and value projections."""
    model = build_model()
    base = model.base_model_prefix + "."
    head = {n for n, _ in model.named_parameters() if not n.startswith(base) or n.startswith("bert.pooler.")}
    pruner = pk.attach(model, pk.PruneConfig(preset="paper", sparsity=0.25))
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and n not in head}

    def count(*ends):
        return sum(size for n, size in trained.items() if n.endswith(ends))

    assert count(".A", ".B") == low_rank
    assert count(".A", ".B", ".magnitude") == with_magnitudes
    assert sum(trained.values()) == with_masks
    assert len(pruner.layers) == len(pruner.masks) == 2 * blocks
    assert head <= {n for n, p in model.named_parameters() if p.requires_grad}


def test_most_the_paper_preset_can_remove_is_about_a_third():
    with pytest.raises(ValueError, match=r"the most it can remove is 0\.333"):
        pk.attach(
            meta(DistilBertForSequenceClassification, DistilBertConfig()),
            pk.PruneConfig(preset="paper", sparsity=0.34, cost="macs"),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_full_preset_adapts_six_linears_and_masks_five(family):
    model = build(family)
    pruner = pk.attach(model)
    n = [names(family, i) for i in range(2)]
    assert list(pruner.layers) == [name for block in n for name in block.values()]
    assert set(pruner.masks) == {name for block in n for part, name in block.items() if part != "k"}
    assert [m.logits.numel() for m in pruner.masks.values()] == 2 * [HIDDEN, HIDDEN, HIDDEN, FFN, HIDDEN]
    for layer in pruner.layers.values():
        assert isinstance(layer, pk.nn.MaskedDoRALinear) and layer.rank == 8 and layer.scale == 2.0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_trains_and_the_rest_is_frozen(family, task):
    model = build(family, task)
    tied = model.get_input_embeddings().weight
    pk.attach(model)
    for name, p in model.named_parameters():
        adapter = name.endswith((".A", ".B", ".magnitude", ".logits"))
        pooler = name.startswith("bert.pooler")
        head = not name.startswith(family + ".") or pooler
        assert p.requires_grad == (adapter or head), name
    assert not tied.requires_grad  # the masked LM's output weights are the embeddings
    assert any(p.requires_grad for n, p in model.named_parameters() if not n.startswith(family + "."))


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_model_starts_as_the_dense_one(family):
    model = build(family, dtype=torch.float64)
    want = logits(model, batch())
    pk.attach(model)
    for training in (False, True):  # tiny models have no dropout; before the first step nothing is masked
        assert difference(logits(model.train(training), batch()), want) <= 1e-12


def test_training_flag_dtype_and_seed_carry_over():
    a, b, c = build().train(), build().train(), build().train()
    layers = [pk.attach(m, pk.PruneConfig(seed=s)).layers for m, s in ((a, 5), (b, 5), (c, 6))]
    assert all(layer.training for layer in layers[0].values())
    first = [next(iter(x.values())).A for x in layers]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    a_values = [layer.A for layer in layers[0].values()]
    assert len({float(v.flatten()[0].detach()) for v in a_values}) == len(a_values)  # one draw after the other
    half = build(dtype=torch.bfloat16)
    layer = next(iter(pk.attach(half).layers.values()))
    assert layer.weight.dtype == torch.bfloat16 and layer.A.dtype == torch.float32


def test_frozen_weights_are_not_copied():
    model = build()
    linear = model.get_submodule(names("distilbert")["q"])
    pointer = linear.weight.data_ptr()
    pk.attach(model)
    assert model.get_submodule(names("distilbert")["q"]).weight.data_ptr() == pointer


def test_param_groups():
    model = build()
    pruner = pk.attach(model)
    groups = {g["name"]: g for g in pruner.param_groups(1e-3, mask_lr=0.05, weight_decay=0.1)}
    assert groups["adapters"]["lr"] == 1e-3 and groups["adapters"]["weight_decay"] == 0.1
    assert groups["masks"]["lr"] == 0.05 and groups["masks"]["weight_decay"] == 0.0
    every = [id(p) for g in groups.values() for p in g["params"]]
    assert len(every) == len(set(every))
    assert set(every) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in groups["masks"]["params"]} == {id(m.logits) for m in pruner.masks.values()}
    torch.optim.AdamW(pruner.param_groups(1e-3))  # any torch optimiser takes them
    assert float(pruner.penalty()) == 0.0


# -- refusals leave the model as it was ------------------------------------------------------------------------


def refused(model, config, error, message):
    before = state(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        pk.attach(model, config)
    unchanged(model, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules


def test_architecture_without_a_family():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    refused(
        gpt2,
        None,
        ValueError,
        r"GPT2LMHeadModel has no family \(model type 'gpt2'\); accepted: bert, .*distilbert, .*llama, mistral, ",
    )
    refused(
        nn.Sequential(nn.Linear(3, 3)), None, ValueError, r"Sequential has no family \(it is no transformers model\)"
    )


@pytest.mark.parametrize(
    "options,message",
    [
        (
            {"targets": ["query"]},
            r"targets entry 'query' matches no block linear; block linears end in \['k_lin', 'lin1'",
        ),
        ({"targets": ["q_lin", "nope"]}, r"targets entry 'nope' matches no block linear"),
        ({"targets": ["lin"]}, r"targets entry 'lin' matches no block linear"),  # no match in the middle of a name
        ({"targets": ["classifier"]}, r"targets entry 'classifier' matches no block linear"),
        (
            {"targets": ["k_lin"], "sparsity": 0.1},
            r"sparsity must be 0 when no target carries a channel group \(got 0.1\)",
        ),
        (
            {"targets": ["q_lin"], "sparsity": 0.5},
            r"sparsity 0.5 is out of reach of targets \['q_lin'\]; the most it can remove is",
        ),
        (
            {"preset": "paper", "sparsity": 0.5},
            r"sparsity 0.5 is out of reach of preset 'paper'; the most it can remove is",
        ),
        ({"rank": HIDDEN + 1}, rf"rank must be .*{HIDDEN}.* \(got {HIDDEN + 1}\)"),
    ],
)
def test_configs_that_do_not_fit_the_model(options, message):
    refused(build(), pk.PruneConfig(**options), ValueError, message)


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("options,rows", [({"preset": "paper"}, "qkv o"), ({"targets": ["lin2"]}, "down")])
def test_the_most_named_in_the_refusal_is_right(options, rows, cost):
    """Written out: what is left of a block when every group of these carriers is gone."""
    b = int(cost == "params")
    H, F = HIDDEN, FFN
    dense = 4 * H * (H + b) + F * (H + b) + H * (F + b)
    if rows == "down":
        left = dense - H * (F + b)
    else:  # q and v rows, k rows with them, o's columns (its rows keep their bias)
        left = H * b + F * (H + b) + H * (F + b)
    most = 1 - left / dense
    refused(
        build(), pk.PruneConfig(sparsity=0.9, cost=cost, **options), ValueError, f"is {most:.4f} of the block {cost}"
    )
    pk.attach(build(), pk.PruneConfig(sparsity=most - 1e-9, cost=cost, **options))


def test_rank_that_fits_some_layers_only():
    """FFN 30: rank 40 fits the attention, not the FFN, which comes after it."""
    refused(build(hidden_dim=30), pk.PruneConfig(rank=40), ValueError, r"rank must be .* \(got 40\)")


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_that_is_not_zero_at_zero(family):
    key = "activation" if family == "distilbert" else "hidden_act"
    refused(
        build(family, **{key: "sigmoid"}), None, ValueError, r"activation must be zero at zero .* \(got 'sigmoid'\)"
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("change", [{"is_decoder": True}, {"is_decoder": True, "add_cross_attention": True}])
def test_decoder(family, change):
    refused(build(family, **change), None, ValueError, "is_decoder and add_cross_attention must be False")


def test_twice_attached_and_compact():
    model = build()
    pruner = attached(model)
    refused(model, None, ValueError, "model is attached already")
    assert pruner.masks
    refused(pk.compact(model), None, ValueError, "model is compact already")


def test_linears_that_are_not_plain():
    """A layer another library has replaced (PEFT's, a quantised one) would lose what it carries."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_lin"]))
    refused(model, None, ValueError, r"q_lin'? (must be|is) .*Linear")
    model = build()
    model.get_submodule(names("distilbert")["up"]).weight = nn.Parameter(
        torch.zeros(FFN, HIDDEN, dtype=torch.int8), requires_grad=False
    )
    refused(model, None, ValueError, r"lin1'? must .*int8")


def test_config_of_another_type():
    refused(build(), {"sparsity": 0.5}, TypeError, r"config must be a PruneConfig \(got dict\)")


def test_cpu_bf16_autocast_where_bf16_crashes(monkeypatch):
    model = build()
    monkeypatch.setattr(attach_file, "bf16_matmul_crashes", lambda: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refused(model, None, RuntimeError, "bf16 autocast is off limits here: .* Train in fp32, or start Python with")
    monkeypatch.setattr(attach_file, "bf16_matmul_crashes", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pk.attach(model)


def test_no_autocast_no_question(monkeypatch):
    def ask():
        raise AssertionError("asked without need: it starts a process")

    monkeypatch.setattr(attach_file, "bf16_matmul_crashes", ask)
    pk.attach(build())
    with torch.autocast("cpu", dtype=torch.float16):
        pk.attach(build())


def test_the_question_is_answered_by_a_child_that_may_die(monkeypatch):
    """True exactly when the child is killed by a signal."""
    ask = narrow.bf16_matmul_crashes.__wrapped__
    monkeypatch.setattr(narrow, "_cpu_flags", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(narrow.subprocess, "run", lambda *_, **__: pytest.fail("asked without need"))
    assert ask() is False
    monkeypatch.undo()
    for code, answer in (("import os, signal; os.kill(os.getpid(), signal.SIGILL)", True), ("pass", False)):
        real = subprocess.run

        def run(command, code=code, real=real, **kwargs):
            return real([sys.executable, "-c", code], **kwargs)

        monkeypatch.setattr(narrow, "_cpu_flags", lambda: frozenset({"amx_tile"}))
        monkeypatch.setattr(narrow.subprocess, "run", run)
        assert ask() is answer
        monkeypatch.undo()


# -- imports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement", ["import prunekern", "import prunekern.nn", "import prunekern.ops", "prunekern.info()"]
)
def test_imports_no_transformers(statement):
    code = f"import sys, prunekern; {statement}; assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names():
    for name in ("PruneConfig", "attach", "plan", "compact", "save", "load", "info", "PruneTrainer", "Pruner", "Plan"):
        assert callable(getattr(pk, name)), name
    import prunekern.attach  # noqa: F401  (must not put the module in the function's place)
    import prunekern.compact  # noqa: F401
    import prunekern.plan  # noqa: F401

    assert callable(pk.attach) and callable(pk.plan) and callable(pk.compact)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = pk.nope


def test_align_beyond_a_layer_is_refused():
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=r"align must be at most \d+, the channel groups of '.*' \(got 1000\)"):
        pk.attach(model, pk.PruneConfig(align=1000))
    unchanged(model, before)
