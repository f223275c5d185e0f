"""Models of one's own: compact output equals masked, and both equal the dense class with weights by the definition."""

import copy
import pickle

import pytest
import torch

import prunekern as pk
from prunekern.compacting.checkpoint import set_weights
from prunekern.nn import CompactLinear, ShrunkDoRALinear
from tests.helpers.equal_models import F32, F64
from tests.helpers.own_models import (
    CLASSES,
    HIDDEN,
    Encoder,
    Gated,
    GroupedEncoder,
    InterleavedEncoder,
    Mlp,
    StockLayers,
    attached,
    build,
    difference,
    inputs,
    merged,
    prune,
)

SHARES = (0.0, 0.3, 0.8, 1.0)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("cls", CLASSES)
def test_compact_equals_masked_and_merged(cls, share):
    for dtype, tolerance in ((torch.float64, F64), (torch.float32, F32)):
        model = build(cls, dtype)
        prune(attached(model), share, seed=1)
        want = merged(model, build(cls))
        small = pk.compact(model)
        with torch.no_grad():
            for batch, tokens in ((1, 5), (3, 7)):
                x = inputs(model, batch, tokens, dtype)
                expected = want(x.double() if x.is_floating_point() else x)
                assert difference(model(x), expected) <= tolerance
                assert difference(small(x), expected) <= tolerance
        assert type(small) is cls and all(
            isinstance(small.get_submodule(n), CompactLinear) for n in pk.plan(model).layers
        )


@pytest.mark.parametrize("cls", CLASSES)
def test_shrunk_equals_masked_and_trains_on(cls):
    model = build(cls, torch.float64)
    pruner = prune(attached(model, sparsity=0.4), 0.5)
    x = inputs(model, dtype=torch.float64)
    pruner.finalize()
    before, plan = model(x).detach(), pruner.plan()
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-2))
    pruner.shrink(optimizer)
    assert any(isinstance(m, ShrunkDoRALinear) for m in model.modules()) and pruner.plan() == plan
    assert difference(model(x), before) <= F64
    model.train()
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        assert pruner.step()
        optimizer.zero_grad()
    model.eval()
    after = model(x).detach()
    assert difference(after, before) > 1e-4
    assert difference(pk.compact(model)(x), after) <= F64


def test_what_is_removed_is_what_the_groups_say():
    """Written out for one block of grouped queries: 4 query heads of 6 on 2 key/value heads with values of 3."""
    model = build(GroupedEncoder, layers=1)
    pruner = attached(model)
    prune(pruner, 0.0)
    at = "blocks.0.attention."
    off = {at + "q": [4], at + "v": [0, 1, 2, 5], "blocks.0.fc1": [7], at + "o": [14]}
    with torch.no_grad():
        for name, groups in off.items():
            pruner.masks[name].logits[groups] = -1
    layers = pk.plan(model).layers

    def gone(name):
        p = layers[name]
        return tuple(
            sorted(set(range(n)) - set(kept.tolist()))
            for n, kept in zip((p.out_features, p.in_features), (p.rows, p.cols), strict=True)
        )

    # All values of key/value head 0 are gone, so its queries and keys are; of head 1 the rotary pair 1 (group 4).
    assert gone(at + "q") == ([*range(12), 13, 16, 19, 22], [])
    assert gone(at + "k") == ([*range(6), 7, 10], [])
    assert gone(at + "v") == ([0, 1, 2, 5], [])
    assert gone(at + "o") == ([14], [*range(6), 8, 11])
    assert gone("blocks.0.fc1") == ([7], []) and gone("blocks.0.fc2") == ([], [7])
    macs = sum(p.rows.numel() * p.cols.numel() for p in layers.values())
    small = pk.compact(model)
    assert (
        pk.plan(small).macs(3)
        == 3 * macs
        == 3 * sum(m.weight.numel() for m in small.modules() if hasattr(m, "in_index"))
    )
    assert small.get_submodule("blocks.0.fc1").weight.shape == (HIDDEN - 1, 15)
    x = inputs(model)
    assert difference(small(x), model(x)) <= F32


def test_where_the_channels_stand():
    """An MLP packs its kept channels, unless its width is to stay; attention keeps its heads' width."""
    model = build(Gated)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    first, second = small.layers
    assert first["up"].out_index is None and first["down"].in_index is None and first["down"].out_index is not None
    assert second["up"].out_features == HIDDEN and second["up"].out_index is not None
    assert torch.equal(second["up"].out_index, second["down"].in_index)
    model = build(Encoder)
    prune(attached(model), 0.5)
    attention = pk.compact(model).blocks[0].attention
    assert attention.q.out_features == 15 and torch.equal(attention.v.out_index, attention.o.in_index)


def test_pytorchs_own_layers_do_not_go_past_the_masks():
    """In eval mode without gradients they read the weights of their linears: here they must call them."""
    model = build(StockLayers)
    x, padding = inputs(model), torch.arange(7) >= torch.tensor([[7], [5], [3]])
    with torch.no_grad():
        dense = model(x, padding)
    prune(attached(model), 0.5)
    small = pk.compact(model)
    called = []
    for module in small.modules():
        if isinstance(module, CompactLinear):
            module.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        masked, compact = model(x, padding), small(x, padding)
        with torch.enable_grad():
            slow = model(x, padding)
    assert len(called) == 4
    real = ~padding
    assert difference(masked[real], slow[real]) <= F32 and difference(compact[real], masked[real]) <= F32
    assert difference(masked[real], dense[: len(masked), : masked.shape[1]][real]) > 1e-2


@pytest.mark.parametrize("cls", [Mlp, InterleavedEncoder])
def test_copies_pickles_and_state_dicts(cls):
    model = build(cls)
    prune(attached(model), 0.4)
    x = inputs(model)
    small = pk.compact(model)
    want = small(x)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(x), want) and pk.plan(twin) == pk.plan(small)
        twin.load_state_dict(small.state_dict())
        assert torch.equal(twin(x), want)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x)) and torch.equal(pk.compact(copy.deepcopy(again))(x), want)
    assert set(small.state_dict()) == set(build(cls).state_dict())


def test_in_few_bits():
    model = build(Encoder)
    prune(attached(model), 0.3)
    small, x = pk.compact(model), inputs(model)
    want = small(x)
    for kind, worst in (("bf16", 2e-2), ("int8", 5e-2), ("int4", 0.5)):
        set_weights(small, kind)
        assert all(m.weights == kind for m in small.modules() if isinstance(m, CompactLinear))
        assert 0 < difference(small(x), want) < worst


def test_a_subclass_is_found_by_its_class_and_the_nearest_counts():
    class Wider(Mlp):
        pass

    model = build(Wider, hidden=31)
    prune(attached(model), 0.5)
    x = inputs(model)
    assert difference(pk.compact(model)(x), model(x)) <= F32
    pk.families.register(Wider, [pk.families.mlp_group("fc1", "fc2")])
    assert set(pk.families.of(Wider()).table(Wider()).layers) == {"fc1", "fc2"}
    pk.families.unregister(Wider)
    assert len(pk.families.of(Wider()).table(Wider()).layers) == 3


def test_the_function_of_the_model_is_asked_of_dense_models_only():
    """What it reads, the width of a layer say, is another one once channels are gone."""

    class Own(Mlp):
        pass

    asked = []

    def groups(model):
        asked.append(model.fc1.out_features)
        return [pk.families.mlp_group("fc1", "fc2")]

    pk.families.register(Own, groups)
    model = build(Own)
    pruner = prune(attached(model, sparsity=0.3), 0.5)
    pruner.finalize()
    pruner.shrink()
    pk.plan(pk.compact(model))
    assert set(asked) == {HIDDEN}
