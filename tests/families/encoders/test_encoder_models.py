"""What compaction leaves as it was: the masked model, class, head, ties, ways to call it; and its training before."""

import pytest
import torch

import prunekern as pk
from tests.helpers.equal_models import F64, check
from tests.helpers.tiny_models import (
    FAMILIES,
    HIDDEN,
    TASKS,
    attached,
    batch,
    build,
    difference,
    logits,
    names,
    prune,
    state,
    unchanged,
)

# -- what stays as it was --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_model_is_untouched(family):
    model = build(family)
    pruner = attached(model)
    prune(pruner, 0.5)
    model.train()
    before, grads = state(model), {n: p.requires_grad for n, p in model.named_parameters()}
    types = {n: type(m) for n, m in model.named_modules()}
    small = pk.compact(model)
    unchanged(model, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert all(m.training for m in model.modules()) and not any(m.training for m in small.modules())
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config is not small.config
    with torch.no_grad():  # and nothing is shared: what happens to one does not happen to the other
        for p in small.parameters():
            p.add_(1)
    unchanged(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_class_same_head_and_frozen(family):
    for task in TASKS:
        model = build(family, task)
        prune(attached(model), 0.5)
        small = pk.compact(model)
        assert type(small) is type(model)
        assert not any(p.requires_grad for p in small.parameters())
        assert not [n for n, _ in small.named_parameters() if n.endswith((".A", ".B", "magnitude", "logits"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied(family):
    model = build(family, "masked_lm")
    prune(attached(model), 0.5)
    small = pk.compact(model)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert small.get_input_embeddings().weight is not model.get_input_embeddings().weight
    with torch.no_grad():
        before = logits(small, batch())
        small.get_input_embeddings().weight[7] += 1
        assert difference(logits(small, batch()), before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds_and_tuples(family):
    model = build(family, dtype=torch.float64)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    embeds = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        got = small(inputs_embeds=embeds, return_dict=False)
        want = model(inputs_embeds=embeds, return_dict=False)
    assert isinstance(got, tuple) and difference(got[0], want[0]) <= F64
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        assert (
            abs(
                float(small(inputs_embeds=embeds, labels=labels).loss - model(inputs_embeds=embeds, labels=labels).loss)
            )
            < 1e-10
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_can_be_switched_after_compaction(family):
    model = build(family, dtype=torch.float64)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    want = logits(small, batch())
    small.set_attn_implementation("eager")
    assert small.config._attn_implementation == "eager"
    assert difference(logits(small, batch()), want) <= F64


@pytest.mark.parametrize("family", FAMILIES)
def test_activations(family):
    """Every activation that is zero at zero, fused into the product or not, gives what the masked model gives."""
    key = "activation" if family == "distilbert" else "hidden_act"
    accepted = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
    for activation in accepted:
        model = build(family, dtype=torch.float64, **{key: activation})
        prune(attached(model), 0.4)
        check(model, batch(), F64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", ["gelu_fast", "gelu_python", "swish"])
def test_activations_by_their_other_names(family, activation):
    model = build(family, dtype=torch.float64, **{"activation" if family == "distilbert" else "hidden_act": activation})
    prune(attached(model), 0.4)
    check(model, batch(), 1e-6 if activation == "gelu_fast" else F64)  # gelu_fast spells sqrt(2 / pi) with ten digits


# -- training the masked model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    grads = []
    for checkpointing in (False, True):
        model = build(family)
        pruner = attached(model, dropout=0.1)
        pruner.step()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 40
    for name, grad in grads[0].items():
        assert grad is not None and torch.isfinite(grad).all(), name
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_gets_a_gradient(family):
    model = build(family)
    pruner = attached(model)
    for mask in pruner.masks.values():  # a third off: masked channels learn, too
        mask.noise.copy_(torch.where(torch.arange(mask.noise.numel()) % 3 == 0, -9.0, 9.0))
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.requires_grad and not name.endswith("logits"):
            assert float(p.grad.abs().max()) > 0, name
    # Query logits act through the softmax only; each kind has groups, off ones among them, with a gradient.
    n = names(family, 0)
    for part in ("q", "v", "o", "up", "down"):
        mask = pruner.masks[n[part]]
        assert float(mask.logits.grad[::3].abs().max()) > 0, part
