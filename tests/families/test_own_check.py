"""`families.check`: a table that is not that of the forward pass is found out, whatever is between the linears."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern import families
from prunekern.families import attention_group, mlp_group
from tests.helpers.own_models import CLASSES, Attention, Encoder, Mlp, attached, build, inputs


class Between(nn.Module):
    """An MLP with this between its linears."""

    def __init__(self, between, output=lambda y: y):
        super().__init__()
        self.up, self.between, self.down, self.output = nn.Linear(6, 12), between, nn.Linear(12, 5), output

    def forward(self, x):
        return self.output(self.down(self.between(self.up(x))))


@pytest.fixture
def registered():
    """Registers for the length of a test."""
    done = []

    def register(cls, groups):
        families.register(cls, groups)
        done.append(cls)

    yield register
    for cls in done:
        families.unregister(cls)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((12,), 1e-6))  # as networks start that should begin as the identity

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize(
    "between, right",
    [
        (nn.GELU(), (True, True)),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), (True, True)),
        (nn.Tanh(), (True, True)),
        (nn.Sigmoid(), (False, False)),
        (nn.Softplus(), (False, False)),
        (nn.Softmax(-1), (False, False)),
        (nn.LayerNorm(12), (False, False)),
        (nn.RMSNorm(12), (False, True)),  # zeros stay zeros, and count in the mean on both sides
        (Scale(), (False, True)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_lies_between(between, right, full_width, registered):
    registered(Between, [mlp_group("up", "down", full_width=full_width)])
    model, x = Between(between), torch.randn(2, 3, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if right[full_width]:
        families.check(model, x)
        assert families.of(model).is_checked
    else:
        with pytest.raises(ValueError, match=r"check: Between: mlp_group\(up='up', down='down'"):
            families.check(model, x)
        assert not families.of(model).is_checked
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model.up) is nn.Linear and model.training


def test_the_message_says_what_helps(registered):
    registered(Between, [mlp_group("up", "down")])
    with pytest.raises(
        ValueError, match=r"does not run without pruned channels \(.*\); full_width=True keeps the width"
    ):
        families.check(Between(Scale()), torch.randn(2, 6))
    with pytest.raises(ValueError, match="mixes channels, or makes something of a zero"):
        families.check(Between(nn.Sigmoid()), torch.randn(2, 6))


class Tiled(Attention):
    """Query head h reads key/value head h % kv_heads."""

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.q(x).view(b, t, 4, 6), self.k(x).view(b, t, 2, 6), self.v(x).view(b, t, 2, 6)
        k, v = k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)
        y = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", y, v).flatten(2))


class Normed(Attention):
    """Queries and keys are normed, each head by itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.k = nn.Sequential(self.k, nn.Unflatten(-1, (4, 6)), nn.RMSNorm(6), nn.Flatten(2))


WRONG = [
    (Attention, {"rotary": True}, {"rotary": False}),
    (Attention, {"rotary": "interleaved"}, {"rotary": True}),
    (Tiled, {"kv_heads": 2}, {"kv_heads": 2}),
    (Attention, {}, {"heads": 8}),
    (Normed, {}, {"k": "k.0"}),
]


@pytest.mark.parametrize("cls, is_so, said", WRONG, ids=["rotary", "which rotary", "order of heads", "heads", "norm"])
def test_attention_that_is_another(cls, is_so, said, registered):
    model = cls(9, **{"heads": 4, "kv_heads": 4, "head_dim": 6, "value_dim": 6} | is_so)
    registered(cls, [attention_group(**{"q": "q", "k": "k", "v": "v", "o": "o", "heads": 4} | said)])
    with pytest.raises(ValueError, match=f"check: {cls.__name__}: attention_group.*query_key|value"):
        families.check(model, torch.randn(2, 5, 9))


def test_values_alone_where_keys_are_normed(registered):
    registered(Normed, [mlp_group("v", "o", full_width=True)])
    families.check(Normed(9, heads=4, kv_heads=4, head_dim=6, value_dim=6), torch.randn(2, 5, 9))


def test_a_channel_that_cannot_be_seen(registered):
    """Of one token the logits do not matter, so that nothing can be said of queries and keys."""
    with pytest.raises(
        ValueError, match=re.escape("(query_key channels): nothing of it reaches the output with these")
    ):
        families.check(build(Encoder), torch.zeros(2, 1, dtype=torch.int64))

    class Unused(Mlp):
        def forward(self, x):
            return x

    registered(Unused, [mlp_group("fc1", "fc2")])
    with pytest.raises(ValueError, match="check: Unused: layer 'fc1' is not called with these inputs"):
        families.check(Unused(), torch.randn(2, 13))


def test_a_weight_that_is_read_past_its_layer(registered):
    """A mask would do nothing, and nobody would notice in the compact model alone."""

    class Past(Mlp):
        def forward(self, x):
            h = nn.functional.linear(x, self.fc1.weight, self.fc1.bias).relu()
            return self.out(self.fc2(h))

    registered(Past, [mlp_group("fc1", "fc2")])
    with pytest.raises(ValueError, match="layer 'fc1' is not called .* masks and adapters would be passed by"):
        families.check(Past(), torch.randn(2, 13))


@dataclass
class Result:
    hidden: torch.Tensor
    logits: torch.Tensor | None = None


@pytest.mark.parametrize(
    "output",
    [
        lambda y: {"a": y, "b": [y, 3]},
        lambda y: (None, y),
        Result,
        lambda y: Result(y.relu(), y),
        lambda y: torch.cat([y, y.new_tensor([float("-inf"), float("nan")]).expand(*y.shape[:-1], 2)], -1),
        lambda y: [y.float(), y.bfloat16()],
    ],
    ids=["dict", "tuple", "dataclass", "dataclass of two", "infinities", "narrow"],
)
def test_whatever_a_model_returns(output, registered):
    registered(Between, [mlp_group("up", "down")])
    families.check(Between(nn.ReLU(), output), torch.randn(2, 6))
    with pytest.raises(ValueError, match="check: Between: mlp_group"):
        families.check(Between(nn.Sigmoid(), output), torch.randn(2, 6))


def test_a_model_that_runs_in_its_own_dtype_only(registered):
    class Single(nn.Module):
        def forward(self, x):
            return x.float().relu()

    registered(Between, [mlp_group("up", "down")])
    families.check(Between(Single()), torch.randn(2, 6))
    families.check(Between(nn.ReLU()).bfloat16(), torch.randn(2, 6).bfloat16())


def test_random_state_and_refusals(registered):
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    for cls in CLASSES:
        model = cls()
        state = torch.get_rng_state()
        families.check(model, inputs(model))
        assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), want)
    model = build(Mlp)
    with pytest.raises(ValueError, match="check: Linear is not registered"):
        families.check(nn.Linear(2, 2), torch.randn(1, 2))
    attached(model)
    for one in (model, pk.compact(model)):
        with pytest.raises(ValueError, match="check: model must be dense"):
            families.check(one, inputs(one))
    registered(Between, [mlp_group("up", "down")])
    with pytest.raises(ValueError, match="check: Between must return floating-point tensors"):
        families.check(Between(nn.ReLU(), lambda y: y.argmax(-1)), torch.randn(2, 6))
