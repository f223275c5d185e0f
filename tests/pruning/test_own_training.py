"""A plain model through a training loop: budget, stages, head, adapters in a folder, and PEFT."""

import pytest
import torch
from torch.nn import functional as F

import prunekern as pk
from prunekern import families
from prunekern.pruning.adapter import load_adapter_state
from tests.helpers.equal_models import F32
from tests.helpers.own_models import CLASSES, Encoder, Mlp, attached, build, difference, inputs, prune


def train(model, pruner, steps=14, boundary=9):
    """Cross entropy of whether token 5 occurs; finalised and shrunk at the boundary."""
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=1e-2, mask_lr=5e-2))
    model.train()
    for step in range(steps):
        if step == boundary:
            pruner.finalize()
            pruner.shrink(optimizer)
        x = inputs(model, batch=8, seed=step)
        loss = F.cross_entropy(model(x), (x == 5).any(1).long()) + pruner.penalty()
        loss.backward()
        optimizer.step()
        assert pruner.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("cost", ["params", "macs"])
def test_trained_to_the_budget(cost):
    model = build(Encoder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.4, cost=cost, warm_steps=4, ramp_steps=3))
    train(model, pruner)
    plan = pruner.plan()
    assert 0.4 <= plan.sparsity(cost) < 0.43 and pruner.shrunk
    assert plan.macs(2) == 2 * sum(p.rows.numel() * p.cols.numel() for p in plan.layers.values())
    small, x = pk.compact(model), inputs(model)
    assert difference(small(x), model(x)) <= F32
    moved = {
        name
        for name, p in small.named_parameters()
        if p.shape != before[name].shape or not torch.equal(p, before[name])
    }
    assert moved == {f"{layer}.{leaf}" for layer in plan.layers for leaf in ("weight", "bias")} - {
        f"{layer}.bias" for layer in plan.layers if plan.layers[layer].rows.numel() == plan.layers[layer].out_features
    } | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("rule", ["learned", "uniform"])
def test_rules_and_alignment(cls, rule):
    model = build(cls)
    pruner = attached(model, sparsity=0.3, align=2)
    prune(pruner, 0.5)
    report = pruner.finalize(rule)
    assert report["sparsity"] >= 0.3 and all(
        kept % 2 == 0 or kept == of for kept, of in report["kept"].values() if kept
    )


def test_what_is_trained_besides_the_adapters():
    """The head that was named, and nothing else; of a class without, nothing."""
    own = (".A", ".B", ".magnitude", ".logits")
    for cls, head in ((Encoder, {"classifier.weight", "classifier.bias"}), (Mlp, set())):
        model = build(cls)
        attached(model)
        assert {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(own)} == head

    class Own(Encoder):
        pass

    families.register(Own, families.of(build(Encoder)).named(build(Encoder)), head=["embed.weight", "blocks.1.norms"])
    model = build(Own)
    attached(model)
    named = {"embed.weight", *(f"blocks.1.norms.{i}.{leaf}" for i in range(2) for leaf in ("weight", "bias"))}
    assert {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith(own)} == named
    families.unregister(Own)


@pytest.mark.parametrize("shrunk", [False, True])
def test_adapter_folders(shrunk, tmp_path):
    base = build(Encoder).state_dict()
    model = build(Encoder)
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.4, warm_steps=4, ramp_steps=3))
    train(model, pruner, boundary=9 if shrunk else 99)
    pk.save_adapter(pruner, tmp_path / "a")
    x, again = inputs(model), Encoder()
    again.load_state_dict(base)
    loaded = pk.load_adapter(again, tmp_path / "a")
    assert torch.equal(again.eval()(x), model(x)) and loaded.plan() == pruner.plan() and loaded.shrunk == shrunk
    assert torch.equal(pk.compact(again)(x), pk.compact(model)(x))
    third = Encoder()
    third.load_state_dict(base)
    load_adapter_state(pk.attach(third, pruner.config), tmp_path / "a")
    assert torch.equal(third.eval()(x), model(x))
    with pytest.raises(ValueError, match="was trained on another base model"):
        pk.load_adapter(build(Encoder, seed=1), tmp_path / "a")
    with pytest.raises(ValueError, match="save_embeddings must be False or 'auto' for Encoder .got True"):
        pk.save_adapter(pruner, tmp_path / "b", save_embeddings=True)
    with pytest.raises(ValueError, match="architecture must name a transformers model .got 'Encoder'"):
        pk.compact_files(tmp_path, tmp_path / "a", tmp_path / "out")


def test_peft_and_back(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = build(Encoder), inputs(build(Encoder))
    pk.to_peft(attached(model), tmp_path / "p")
    theirs = peft.PeftModel.from_pretrained(build(Encoder), tmp_path / "p").eval()
    assert difference(theirs(x), model(x)) <= F32
    pruner = pk.from_peft(theirs, pk.PruneConfig(rank=2, sparsity=0.3))
    assert difference(pruner.model(x), model(x)) <= F32


def test_targets_and_presets():
    model = build(Encoder)
    pruner = attached(model, targets=["fc1"], sparsity=0.2)
    assert set(pruner.masks) == set(pruner.layers) == {"blocks.0.fc1", "blocks.1.fc1"}
    prune(pruner, 0.5)
    x, small = inputs(model), pk.compact(model)
    assert difference(small(x), model(x)) <= F32
    assert small.blocks[0].fc2.in_index is None and small.blocks[0].fc2.weight.shape[1] < 29
    model = build(Encoder)
    pruner = prune(attached(model, preset="paper"), 0.5)
    assert {name.rpartition(".")[2] for name in pruner.layers} == {"q", "v"}
    assert difference(pk.compact(model)(x), model(x)) <= F32
    with pytest.raises(ValueError, match="PruneConfig: sparsity must be 0 when no target carries a channel group"):
        pk.attach(build(Mlp), pk.PruneConfig(rank=2, preset="paper"))
    with pytest.raises(ValueError, match="targets entry 'q' matches no block linear; block linears end in .*fc1"):
        pk.attach(build(Mlp), pk.PruneConfig(rank=2, targets=["q"]))


def test_a_wrapped_model():
    model = build(Encoder)
    prune(attached(model), 0.5)
    wrapped = torch.nn.DataParallel(model)
    assert pk.plan(wrapped) == pk.plan(model)
    assert difference(pk.compact(wrapped)(inputs(model)), model(inputs(model))) <= F32
    with pytest.raises(ValueError, match="attach: model must not be wrapped in DataParallel yet"):
        pk.attach(torch.nn.DataParallel(build(Encoder)))


def test_a_model_around_one_of_transformers():
    """Registered, it is what is meant; before, one is asked to pass the model inside."""
    from tests.helpers import tiny_models

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_models.build(task="base")
            self.up, self.down = torch.nn.Linear(tiny_models.HIDDEN, 31), torch.nn.Linear(31, 3)

        def forward(self, ids):
            return self.down(torch.relu(self.up(self.body(ids).last_hidden_state.mean(1))))

    with pytest.raises(ValueError, match="attach: model must be the transformers model itself"):
        pk.attach(Around())
    families.register(Around, [families.mlp_group("up", "down")])
    model, ids = Around().eval(), torch.randint(5, 50, (2, 9))
    families.check(model, ids)
    prune(attached(model), 0.5)
    assert difference(pk.compact(model)(ids), model(ids)) <= F32


def test_plain_twin():
    model = build(Encoder)
    prune(attached(model), 0.5)
    small, x = pk.compact(model), inputs(model)
    twin = pk.plain_twin(small)
    assert type(twin) is Encoder and difference(twin(x), small(x)) <= F32
    assert not [m for m in twin.modules() if isinstance(m, pk.nn.CompactLinear)]
    exported = torch.export.export(twin, (x,))
    assert difference(exported.module()(x), small(x)) <= F32
