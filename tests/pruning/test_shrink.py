"""Pruned channels dropped in training: the same function, the same gradients, the optimiser's moments follow."""

import copy

import pytest
import torch
from transformers.optimization import Adafactor

import prunekern as pk
from prunekern.pruning.adapter import load_adapter_state
from tests.helpers.tiny_models import FAMILIES, attached, batch, build, difference, logits, names, state, unchanged

LABELS = torch.tensor([0, 1, 2, 0])
OWN = {"distilbert": ["q_lin", "v_lin"], "bert": ["query", "value"], "roberta": ["query", "value"]}


def step(model, pruner, optimizer, seed):
    """One optimiser step; the loss stays alive, and with it its graph, as in a plain loop."""
    loss = model(**batch(seed=seed), labels=LABELS).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.step()
    return loss


def trained(family="distilbert", optimizer=torch.optim.AdamW, dtype=torch.float32, **options):
    """A model after three steps of stage one and `finalize`, its optimiser, and the last loss."""
    model = build(family, dtype=dtype)
    pruner = attached(model, **{"sparsity": 0.4, "ramp_steps": 0} | options)
    model.train()
    optimizer = optimizer(pruner.param_groups(1e-3, 0.1))
    for seed in range(3):
        loss = step(model, pruner, optimizer, seed)
    pruner.finalize()
    return model, pruner, optimizer, loss


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family, owned, training):
    """owned: only q and v have adapters, k and o shrink with them as plain linears."""
    options = {"targets": OWN[family], "sparsity": 0.2} if owned else {}
    model, pruner, optimizer, _ = trained(family, dtype=torch.float64, **options)
    model.train(training)
    want, plan, report = logits(model, batch()), pruner.plan(), pruner.report()
    before = sum(p.numel() for p in model.parameters())
    pruner.shrink(optimizer)
    assert difference(logits(model, batch()), want) < 1e-12
    assert pruner.shrunk and pruner.plan() == plan and pk.plan(model) == plan and pruner.report() == report
    gone = plan.dense_params() - plan.params()
    assert before - sum(p.numel() for p in model.parameters()) >= gone
    compact = pk.compact(model)
    assert difference(logits(compact, batch()), want) < 1e-10
    assert pk.plan(compact) == plan and sum(p.numel() for p in compact.parameters()) < before - gone


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_masked_ones_of_what_is_kept(family):
    model, pruner, _, _ = trained(family, dtype=torch.float64)
    other = copy.deepcopy(model)
    twin = pk.attach(build(family, dtype=torch.float64), pruner.config)  # for its class only
    twin.model, twin.layers = other, {n: other.get_submodule(n) for n in pruner.layers}
    twin.shrink()
    plan = pruner.plan()
    for m in (model, other):
        m.zero_grad()
        m.train()
        m(**batch(seed=9), labels=LABELS).loss.backward()
    for name, masked in pruner.layers.items():
        rows, cols = plan.layers[name].rows, plan.layers[name].cols
        shrunk = twin.layers[name]
        ratio = shrunk.magnitude.detach() / masked.magnitude.detach()[rows]
        # The magnitude is another one, by the ratio of the norms. So is the norm that is held constant: its share of
        # A's and B's gradients does not enter in either.
        for got, want in (
            (shrunk.A.grad, masked.A.grad[:, cols]),
            (shrunk.B.grad, masked.B.grad[rows]),
            (shrunk.magnitude.grad * ratio, masked.magnitude.grad[rows]),
        ):
            if want.numel():
                assert float((got - want).abs().max()) <= 1e-9 * float(masked.B.grad.abs().max() + want.abs().max())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_optimiser_state_follows(optimizer):
    def make(groups):
        return optimizer(groups, momentum=0.9) if optimizer is torch.optim.SGD else optimizer(groups)

    model, pruner, made, loss = trained(optimizer=make)
    plan = pruner.plan()
    before = {n: copy.deepcopy(made.state[layer.B]) for n, layer in pruner.layers.items()}
    ids = {id(p) for group in made.param_groups for p in group["params"]}
    pruner.shrink(made)
    for name, layer in pruner.layers.items():
        for parameter in (layer.A, layer.B, layer.magnitude):
            assert id(parameter) in ids
            for key, value in made.state[parameter].items():
                assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape, key
        for key, value in before[name].items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                assert torch.equal(made.state[layer.B][key], value[plan.layers[name].rows])
    kept = state(model)
    assert torch.isfinite(step(model, pruner, made, 7))  # while `loss` holds the graph of the old shapes
    assert torch.isfinite(loss)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, kept[n])]
    assert {n.rsplit(".", 1)[1] for n in moved} >= {"A", "B", "magnitude"}
    assert not any(n.endswith("lin.weight") or ".mask." in n for n in moved)


def test_factored_moments_follow_and_others_are_forgotten():
    model, pruner, made, _ = trained(optimizer=lambda groups: Adafactor(groups, lr=1e-3, relative_step=False))
    name = names("distilbert")["down"]
    layer, kept = pruner.layers[name], pruner.plan().layers[name]
    made.state[layer.magnitude]["history"] = torch.zeros(7, 3)
    old = {p: copy.deepcopy(made.state[p]) for p in (layer.A, layer.B)}
    assert 0 < kept.rows.numel() < layer.B.shape[0] and 0 < kept.cols.numel() < layer.A.shape[1]
    pruner.shrink(made)
    for p, key, index in ((layer.A, "col", kept.cols), (layer.B, "row", kept.rows)):
        assert torch.equal(made.state[p][f"exp_avg_sq_{key}"], old[p][f"exp_avg_sq_{key}"][index])
        other = {"col": "row", "row": "col"}[key]
        assert torch.equal(made.state[p][f"exp_avg_sq_{other}"], old[p][f"exp_avg_sq_{other}"])
    assert layer.magnitude not in made.state
    assert torch.isfinite(step(model, pruner, made, 7))


def test_magnitude_moments_are_those_of_the_scaled_magnitude():
    """Adam's step is blind to the scale of a gradient: moments over c and c squared give the same step."""
    model, pruner, made, _ = trained()
    name = names("distilbert")["down"]
    layer, rows = pruner.layers[name], pruner.plan().layers[name].rows
    before, old = layer.magnitude.detach()[rows], copy.deepcopy(made.state[layer.magnitude])
    pruner.shrink(made)
    ratio, own = layer.magnitude.detach() / before, made.state[layer.magnitude]
    assert float((ratio - 1).abs().max()) > 0.05  # columns are gone, the norm is another one
    torch.testing.assert_close(own["exp_avg"] * ratio, old["exp_avg"][rows])
    torch.testing.assert_close(own["exp_avg_sq"] * ratio**2, old["exp_avg_sq"][rows])


def test_refused_before_finalize_and_idempotent_after():
    model = build()
    pruner = attached(model, sparsity=0.4)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"shrink: the masks are not final; call pruner.finalize\(\) first"):
        pruner.shrink()
    unchanged(model, before)
    pruner.finalize()
    pruner.shrink()
    before = state(model)
    pruner.shrink()
    with pytest.raises(RuntimeError, match="finalize: the pruned channels are dropped already"):
        pruner.finalize("uniform", "random")
    unchanged(model, before)


@pytest.mark.parametrize("kept", ["no head", "no channel at all", "everything"])
def test_edges(kept):
    from tests.helpers.tiny_models import HEAD_DIM, HIDDEN, keep_only

    model = build(dtype=torch.float64)
    pruner = attached(model)
    if kept != "everything":
        n = names("distilbert")
        some = torch.ones(HIDDEN, dtype=torch.bool).numpy()
        some[:HEAD_DIM] = False
        keep_only(pruner, {n["v"]: some} if kept == "no head" else {c: some & False for c in (n["v"], n["o"])})
    for mask in pruner.masks.values():
        mask.finalize(mask.kept())
    want = logits(model, batch())
    pruner.shrink()
    assert difference(logits(model, batch()), want) < 1e-12
    model.train()
    model(**batch(), labels=LABELS).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model, pruner, made, _ = trained(family)
    pruner.shrink(made)
    step(model, pruner, made, 5)
    model.eval()
    pk.save_adapter(pruner, tmp_path / "a")
    again = build(family)
    loaded = pk.load_adapter(again, tmp_path / "a")
    assert loaded.shrunk and loaded.finalized and loaded.plan() == pruner.plan() and loaded.steps == pruner.steps
    assert torch.equal(logits(again, batch()), logits(model, batch()))
    assert difference(logits(pk.compact(again), batch()), logits(model, batch())) < 1e-4


def test_adapter_of_another_plan_into_a_shrunk_model_is_refused(tmp_path):
    (_, first, _, _), (model, second, _, _) = trained(), trained()
    first.shrink()
    pk.save_adapter(first, tmp_path / "a")
    with torch.no_grad():
        for mask in second.masks.values():
            mask.finalize(mask.kept().flip(0))  # as many of each
    second.shrink()
    before = state(model)
    with pytest.raises(ValueError, match="the model is shrunk already, to other channels than the state's"):
        load_adapter_state(second, tmp_path / "a")
    unchanged(model, before)
    load_adapter_state(first, tmp_path / "a")


def test_adapter_of_another_plan_is_refused(tmp_path):
    model, pruner, _, _ = trained()
    pruner.shrink()
    pk.save_adapter(pruner, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    text = file.read_text()
    for old, new, message in (
        ('"bias": true', '"bias": false', "plan: layer .* must be"),
        ('"rows": "all"', '"rows": "zz"', "plan: layer .* rows must be 'all' or a hexadecimal bitmap"),
    ):
        if old in text:
            file.write_text(text.replace(old, new, 1))
            fresh = build()
            before = state(fresh)
            with pytest.raises(ValueError, match=message):
                pk.load_adapter(fresh, tmp_path / "a")
            unchanged(fresh, before)
