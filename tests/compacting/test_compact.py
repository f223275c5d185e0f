"""compact: what the new model is. That it computes the same is in tests/families."""

import copy

import pytest
import torch

import prunekern as pk
from prunekern.compacting.hf import skeleton
from tests.helpers.tiny_models import (
    FAMILIES,
    FFN,
    HIDDEN,
    attached,
    batch,
    build,
    difference,
    keep_only,
    logits,
    names,
    prune,
    reference,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_have_the_kept_shape_and_the_merged_numbers(family):
    model = build(family, dtype=torch.float64)
    prune(attached(model), 0.4)
    small, plan, dense = pk.compact(model), pk.plan(model), reference(model)
    for name, layer in plan.layers.items():
        module = small.get_submodule(name)
        assert isinstance(module, pk.nn.CompactLinear)
        # The reference is merged by the definition; its pruned rows are zero, so compare the kept ones.
        whole = dense.get_submodule(name)
        partner = name.endswith(("k_lin", "key"))
        want = whole.weight[layer.rows][:, layer.cols]
        assert module.weight.shape == (len(layer.rows), len(layer.cols))
        torch.testing.assert_close(module.weight, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(module.bias, whole.bias[layer.rows], rtol=0, atol=0)
        assert partner or bool((want != 0).any(1).all()) or want.numel() == 0


def test_parameter_count_falls_by_what_the_plan_says():
    model = build()
    dense = sum(p.numel() for p in model.parameters())
    prune(attached(model), 0.5)
    small, plan = pk.compact(model), pk.plan(model)
    assert sum(p.numel() for p in small.parameters()) == dense - plan.dense_params() + plan.params()


def test_config_carries_the_plan():
    model = build()
    prune(attached(model), 0.5)
    section = pk.compact(model).config.quantization_config.to_dict()
    assert section["quant_method"] == "prunekern" and section["format"] == 1
    assert pk.Plan.from_dict(section["plan"]) == pk.plan(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_model(dtype):
    model = build(dtype=dtype)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_follows_the_masks_of_the_moment():
    model = build(dtype=torch.float64)
    pruner = attached(model)
    n = names("distilbert")
    first = pk.compact(model)
    keep_only(pruner, {n["up"]: torch.arange(FFN).numpy() < 10})
    second = pk.compact(model)
    assert second.get_submodule(n["up"]).weight.shape == (10, HIDDEN)
    assert first.get_submodule(n["up"]).weight.shape[0] != 10
    assert difference(logits(second, batch()), logits(model, batch())) <= 1e-10


def test_follows_weights_changed_without_a_forward():
    """The cached norm must not be the one from before the change."""
    model = build(dtype=torch.float64)
    pruner = attached(model)
    logits(model, batch())
    with torch.no_grad():
        for layer in pruner.layers.values():
            layer.B.mul_(-2)
    assert difference(logits(pk.compact(model), batch()), logits(reference(model), batch())) <= 1e-10


def test_twice_is_the_same():
    model = build()
    prune(attached(model), 0.5)
    a, b = pk.compact(model), pk.compact(model)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_compact_models_cast_copy_and_fine_tune():
    model = build()
    prune(attached(model), 0.5)
    small = pk.compact(model)
    want = logits(small, batch())
    assert difference(logits(copy.deepcopy(small), batch()), want) <= 1e-6
    assert difference(logits(copy.deepcopy(small).double(), batch()), want) <= 1e-5
    small.requires_grad_(True).train()
    small(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    n = names("distilbert")
    for part in n.values():
        grad = small.get_submodule(part).weight.grad
        assert grad is not None and torch.isfinite(grad).all() and float(grad.abs().max()) > 0


def test_dense_model_is_refused():
    with pytest.raises(
        ValueError, match="DistilBertForSequenceClassification has no masked layers; call prunekern.attach"
    ):
        pk.compact(build())


def test_compact_model_is_refused():
    model = build()
    prune(attached(model), 0.5)
    small = pk.compact(model)
    with pytest.raises(ValueError, match="compact"):
        pk.compact(small)


def test_skeleton_has_the_same_tensors_without_storage():
    model = build(dtype=torch.float64)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    empty = build(dtype=torch.float64)
    skeleton(empty, pk.plan(model))
    want = {n: (p.shape, p.dtype) for n, p in small.named_parameters()}
    assert {n: (p.shape, p.dtype) for n, p in empty.named_parameters()} == want
    block = {n for n, p in empty.named_parameters() if p.is_meta}
    assert block == {f"{name}.{leaf}" for name in pk.plan(model).layers for leaf in ("weight", "bias")}
    indices = {n: b for n, b in empty.named_buffers() if n.endswith("_index")}
    own = dict(small.named_buffers())
    assert indices and all(torch.equal(b, own[n]) for n, b in indices.items())


def test_compile_fullgraph():
    model = build()
    prune(attached(model), 0.5)
    small = pk.compact(model)
    inputs = batch()
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    assert difference(logits(compiled, inputs), logits(small, inputs)) <= 1e-5
