"""Models of images, and of images and text: compact equals masked, and both equal a stock model merged by the
definition; blocks run on the kernels, and by parts where somebody looks on.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern import families
from prunekern.nn import CompactAttention, CompactLinear
from tests.helpers.equal_models import F32, F64
from tests.helpers.tiny_models import attached, difference, keep_only, prune, reference, unchanged, watch
from tests.helpers.tiny_models import state as state_of
from tests.helpers.tiny_vision import IMAGE, MODELS, TEXT, batch, build, names, outputs

# One of each kind of block, text and images, causal and not.
KINDS = (
    "ViTForImageClassification",
    "DeiTModel",
    "CLIPTextModel",
    "CLIPVisionModel",
    "SiglipTextModel",
    "Siglip2Model",
)
BLOCK = ["compact_linear", "compact_attention", "compact_linear", "compact_mlp"]  # q, k, v in one; heads; o; the FFN


def check(model, small, tolerance, sizes=((1, False), (3, True))):
    dtype, name, exact = model.dtype, type(model).__name__, reference(model)
    for size, padded in sizes:
        want = outputs(model, batch(name, size, padded=padded, dtype=dtype))
        stock = outputs(exact, batch(name, size, padded=padded, dtype=torch.float64))
        assert difference(want, stock) <= tolerance
        assert difference(outputs(small, batch(name, size, padded=padded, dtype=dtype)), want) <= tolerance


@functools.cache
def masked(name, share=0.5, attention="sdpa", dtype=torch.float32):
    """Shared by tests that leave it alone."""
    model = build(name, attention, dtype)
    prune(attached(model), share, seed=1)
    return model


@functools.cache
def shared_compact(name, share=0.5):
    return pk.compact(masked(name, share))


def compact(name, share=0.5):
    return copy.deepcopy(shared_compact(name, share))


def linears_of(model, part="q"):
    return [model.get_submodule(getattr(block, part)) for _, block in families.of(model).blocks(model)]


# -- the core promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", (0.0, 0.4, 1.0))
@pytest.mark.parametrize("name", KINDS)
def test_compact_equals_masked(name, share):
    model = masked(name, share, dtype=torch.float64)
    check(model, pk.compact(model), F64)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in KINDS])
def test_every_class(name):
    model = masked(name, 0.4, dtype=torch.float64)
    small = pk.compact(model)
    assert type(small) is type(model) and not any(p.requires_grad for p in small.parameters())
    check(model, small, F64)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("name", KINDS)
def test_fp32_runs_on_the_kernels(name, attention, monkeypatch):
    model = masked(name, attention=attention)
    small = pk.compact(model)
    calls = watch(monkeypatch)
    check(model, small, F32, [(3, True)])
    blocks = len(families.of(small).blocks(small))
    assert calls == (BLOCK if attention == "sdpa" else ["compact_linear"] * 4 + ["compact_mlp"]) * blocks


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_eager_in_double(attention):
    model = masked("CLIPModel", 0.6, attention, torch.float64)
    check(model, pk.compact(model), F64)


def only(size, *ranges):
    kept = np.zeros(size, bool)
    for first, last in ranges:
        kept[first:last] = True
    return kept


def edges(sizes):
    hidden, heads, ffn = sizes["hidden_size"], sizes["num_attention_heads"], sizes["intermediate_size"]
    d = hidden // heads
    none, some = np.zeros(hidden, bool), only(hidden, (0, d), (2 * d, 3 * d - 1))
    return {
        "heads vanished": {"v": some},
        "no query and key in the layer": {"q": none},
        "queries of heads without values": {"q": only(hidden, (d, 2 * d)), "v": some},
        "one channel of each": {"q": only(hidden, (5, 6)), "v": only(hidden, (17, 18)), "up": only(ffn, (70, 71))},
        "o without input": {"v": none},
        "rows of o and down": {"o": only(hidden, (3, 20)), "down": only(hidden, (0, 1), (30, 39))},
        "attention writes nothing": {"q": none, "v": none, "o": none},
        "FFN empty": {"up": np.zeros(ffn, bool)},
        "whole layer gone": {"q": none, "v": none, "o": none, "up": np.zeros(ffn, bool), "down": none},
    }


@pytest.mark.parametrize("edge", edges(IMAGE))
@pytest.mark.parametrize("name,tower", [("ViTModel", "image"), ("CLIPTextModel", "text")])
def test_edge(name, tower, edge):
    n, kept = names(name, tower, 1), edges(TEXT if tower == "text" else IMAGE)[edge]
    fewer = {"num_hidden_layers": 2}
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32))[: 1 + (tower == "text")]:
        model = build(name, dtype=dtype, **fewer)
        keep_only(attached(model), {n[part]: on for part, on in kept.items()})
        check(model, pk.compact(model), tolerance, [(3, True)])


def test_names_written_out_are_those_of_the_blocks():
    for name, tower, layers in (("ViTForImageClassification", "image", 3), ("DeiTModel", "image", 3),
                                ("CLIPTextModel", "text", 2), ("SiglipVisionModel", "image", 3)):  # fmt: skip
        found = [vars(block) for _, block in families.of(build(name)).blocks(build(name))]
        assert found == [names(name, tower, layer) for layer in range(layers)]
    found = [vars(block) for _, block in families.of(build("CLIPModel")).blocks(build("CLIPModel"))]
    assert found == [names("CLIPModel", t, i) for t, n in (("text", 2), ("image", 3)) for i in range(n)]


def test_what_pools_an_image_stays_dense():
    small = compact("SiglipVisionModel", 1.0)
    assert type(small.head.attention) is nn.MultiheadAttention and type(small.head.mlp.fc1) is nn.Linear
    assert small.head.mlp.fc1.weight.shape == (IMAGE["intermediate_size"], IMAGE["hidden_size"])


def test_both_towers_under_one_budget():
    """One ranking over both; each tower has its own width and heads."""
    model = build("CLIPModel", dtype=torch.float64)
    pruner = attached(model, sparsity=0.4)
    pruner.step()
    report = pruner.finalize()
    assert abs(pruner.sparsity() - 0.4) < 1e-3 and report
    plan = pk.plan(model)
    by_tower = {}
    for name, layer in plan.layers.items():
        kept, dense = by_tower.get(name.split(".")[0], (0, 0))
        by_tower[name.split(".")[0]] = kept + layer.params(), dense + layer.dense_params()
    assert set(by_tower) == {"text_model", "vision_model"} and all(k < d for k, d in by_tower.values())
    assert sum(k for k, _ in by_tower.values()) == plan.params()
    check(model.eval(), pk.compact(model), F64)


# -- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("CLIPTextModel", "SiglipTextModel"))
def test_padding_changes_nothing(name):
    small, length, tail = compact(name), 6, 4
    ids = batch(name, 2, length, padded=False)["input_ids"]
    with torch.no_grad():
        want = small(input_ids=ids).last_hidden_state
        for filler in (3, 40):
            padded = torch.cat([ids, torch.full((2, tail), filler)], 1)
            mask = torch.cat([torch.ones_like(ids), torch.zeros(2, tail, dtype=torch.int64)], 1)
            got = small(input_ids=padded, attention_mask=mask).last_hidden_state[:, :length]
            assert difference(got, want) <= F32


def test_text_of_clip_reads_from_left_to_right(monkeypatch):
    for name, is_causal in (("CLIPTextModel", True), ("SiglipTextModel", False)):
        small = compact(name)
        assert {m.causal for m in small.modules() if isinstance(m, CompactAttention)} == {is_causal}
        ids = batch(name, 2, 8, padded=False)["input_ids"]
        other = ids.clone()
        other[:, 5:] = 7
        calls = watch(monkeypatch)
        with torch.no_grad():
            first, second = (small(input_ids=i).last_hidden_state[:, :5] for i in (ids, other))
        assert calls.count("compact_attention") == 2 * TEXT["num_hidden_layers"]
        assert (difference(first, second) <= F32) is is_causal


@pytest.mark.parametrize("name", ("CLIPTextModel", "SiglipTextModel"))
def test_masks_of_ones_own(name):
    """[batch, 1, tokens, tokens]: causal, by keys, a band; each as the masked model reads it."""
    small, model = compact(name), masked(name)
    ids = batch(name, 2, 7, padded=False)["input_ids"]
    every = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    by_keys = every.clone()
    by_keys[..., 4:] = False
    for mask in (every, every.tril(), by_keys, by_keys.tril(), every.tril(1).triu(-1)):
        with torch.no_grad():
            got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (small, model))
        assert difference(got, want) <= F32


# -- everyone who puts a hand on it ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("ViTForImageClassification", "CLIPTextModel"))
def test_whoever_listens_is_heard(name, monkeypatch):
    small, inputs = compact(name), batch(name)
    want = outputs(small, inputs)
    block, n = families.of(small).blocks(small)[1]
    inner = [small.get_submodule(part) for part in vars(n).values()]
    heard = []
    for module in (block, small.get_submodule(n.q.rpartition(".")[0]), block.mlp, block.mlp.activation_fn, *inner):
        handle = module.register_forward_hook(lambda m, args, y: heard.append(m))
        assert difference(outputs(small, inputs), want) <= F32
        assert heard == [module]
        handle.remove()
        heard.clear()
    calls = watch(monkeypatch)
    assert torch.equal(outputs(small, inputs), want) and calls == BLOCK * (len(calls) // 4)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return (2 * y[0], *y[1:]) if isinstance(y, tuple) else 2 * y


@pytest.mark.parametrize("part", ("o", "up", "mlp", "attention"))
def test_modules_put_in_the_place_of_ours_are_called(part):
    name = "ViTForImageClassification"
    small, model, inputs = compact(name), copy.deepcopy(masked(name)), batch(name)
    before = outputs(small, inputs)
    for one in (small, model):
        n = names(name, layer=1)
        path = {"mlp": n["up"].rpartition(".")[0], "attention": n["q"].rpartition(".")[0]}.get(part, n.get(part))
        parent, _, child = path.rpartition(".")
        setattr(one.get_submodule(parent), child, Doubled(one.get_submodule(path)))
    got = outputs(small, inputs)
    assert difference(got, outputs(model, inputs)) <= F32 and difference(got, before) > 1e-3


def test_dropout_is_not_passed_over():
    for name, changes in (
        ("ViTForImageClassification", {"hidden_dropout_prob": 0.5}),
        ("DeiTModel", {"attention_probs_dropout_prob": 0.5}),
        ("CLIPTextModel", {"attention_dropout": 0.5}),
    ):
        model = build(name, **changes)
        attached(model)
        small, inputs = pk.compact(model), batch(name)
        want = outputs(small, inputs)
        assert difference(outputs(small.train(), inputs), want) > 1e-3
        assert torch.equal(outputs(small.eval(), inputs), want)


def test_gradients_take_padded_heads(monkeypatch):
    for name in ("ViTForImageClassification", "CLIPTextModel"):
        small, inputs = compact(name), batch(name)
        want = outputs(small, inputs)
        calls = watch(monkeypatch)
        small.requires_grad_(True)
        out = small(**inputs)
        assert out[0].requires_grad and "compact_attention" not in calls
        assert difference(outputs(small, inputs), want) <= F32


@pytest.mark.parametrize("name", ("ViTForImageClassification", "CLIPModel"))
def test_attentions_and_hidden_states(name):
    model = masked(name, attention="eager")
    got, want = (
        m(**batch(name), output_attentions=True, output_hidden_states=True) for m in (pk.compact(model), model)
    )
    if name == "CLIPModel":
        got, want = (out.vision_model_output for out in (got, want))
    assert len(got.hidden_states) == len(want.hidden_states) == IMAGE["num_hidden_layers"] + 1
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert difference(a, b) <= F32
    assert len(got.attentions) == IMAGE["num_hidden_layers"]
    for a in got.attentions:
        torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1]))


def test_compiled_whole():
    model = build("CLIPTextModel", num_hidden_layers=1)
    prune(attached(model), 0.5)
    small, inputs = pk.compact(model), batch("CLIPTextModel")
    want = outputs(small, inputs)
    torch.compiler.reset()
    small.compile(fullgraph=True, backend="aot_eager")
    assert difference(outputs(small, inputs), want) <= F32


# -- training the masked model ---------------------------------------------------------------------------------


def loss_of(model, inputs):
    labels = {"labels": torch.tensor([0, 1, 2])} if "Classification" in type(model).__name__ else {"return_loss": True}
    return model(**inputs, **labels).loss


HEADS = {
    "ViTForImageClassification": {"classifier.weight", "classifier.bias"},
    "CLIPForImageClassification": {"classifier.weight", "classifier.bias"},
    "CLIPModel": {"logit_scale", "visual_projection.weight", "text_projection.weight"},
    "SiglipModel": {"logit_scale", "logit_bias"},
}


@pytest.mark.parametrize("name", HEADS)
def test_a_step_with_and_without_checkpointing(name):
    """What is trained: adapters, masks, and what lies outside the towers."""
    grads = []
    for checkpointing in (False, True):
        model = build(name)
        pruner = attached(model, sparsity=0.3)
        pruner.step()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, batch(name)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    own = (".A", ".B", ".magnitude", ".logits")
    assert {n for n in grads[0] if not n.endswith(own)} == HEADS[name]
    for parameter, grad in grads[0].items():
        assert grad is not None and torch.isfinite(grad).all(), parameter
        torch.testing.assert_close(grads[1][parameter], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ("ViTForImageClassification", "CLIPModel"))
def test_shrunk_model_trains_on(name):
    model = build(name)
    pruner = attached(model, sparsity=0.4)
    pruner.step()
    pruner.finalize()
    inputs = batch(name)
    want = outputs(model.eval(), inputs)
    pruner.shrink()
    assert difference(outputs(model, inputs), want) <= F32
    loss_of(model.train(), inputs).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith(".magnitude"))
    small = pk.compact(model.eval())
    assert difference(outputs(small, inputs), want) <= F32
    assert not any(isinstance(m, CompactLinear) for m in model.modules())


def test_masked_model_is_untouched():
    model = build("CLIPModel")
    prune(attached(model), 0.5)
    before = state_of(model)
    pk.compact(model)
    unchanged(model, before)


def test_activations_that_are_not_zero_at_zero_are_refused():
    for changes in ({"image": {"hidden_act": "sigmoid"}}, {"text": {"hidden_act": "sigmoid"}}):
        with pytest.raises(ValueError, match="activation must be zero at zero .*quick_gelu.*'sigmoid'"):
            pk.attach(build("CLIPModel", **changes), pk.PruneConfig(rank=4))
    for activation in ("quick_gelu", "relu"):
        model = build("ViTModel", dtype=torch.float64, hidden_act=activation)
        prune(attached(model), 0.4)
        check(model, pk.compact(model), F64, [(2, False)])
