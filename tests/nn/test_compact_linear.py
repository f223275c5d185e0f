"""CompactLinear and CompactMLP: numbers, the packed cache, copies, tracing, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunekern import _native
from prunekern.nn import CompactLinear, CompactMLP
from prunekern.nn.compact_mlp import fused_plain
from prunekern.ops.compact_linear import compact_linear_reference

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))


def layer(activation: str = "gelu") -> CompactLinear:
    out_index = torch.randperm(80)[:40].sort().values
    in_index = torch.randperm(30)[:24].sort().values
    return CompactLinear(torch.randn(40, 24), torch.randn(40), in_index, out_index, 80, activation)


def expected(m: CompactLinear, x: torch.Tensor, residual=None) -> torch.Tensor:
    bias = None if m.bias is None else m.bias.detach().double()
    return compact_linear_reference(
        x.double(), m.weight.detach().double(), bias, m.in_index, m.out_index, m.out_features, m.activation,
        None if residual is None else residual.double(),
    )  # fmt: skip


def assert_layer(m: CompactLinear, x: torch.Tensor, residual=None) -> None:
    torch.testing.assert_close(m(x, residual).double(), expected(m, x, residual), rtol=1e-5, atol=1e-5)


def test_forward():
    m, x, residual = layer(), torch.randn(2, 5, 30), torch.randn(2, 5, 80)
    for _ in range(2):
        assert_layer(m, x)
        assert_layer(m, x, residual)
    plain = CompactLinear(torch.randn(7, 5))
    torch.testing.assert_close(plain(x[..., :5]), F.linear(x[..., :5], plain.weight))


def test_state_dict_holds_the_plain_weight_and_bias_only():
    m = layer().pack()
    m(torch.randn(3, 30))
    assert sorted(m.state_dict()) == ["bias", "weight"]
    assert m.state_dict()["weight"].shape == (40, 24)
    assert not any(p.requires_grad for p in m.parameters())


@native
def test_packs_once_and_again_when_the_weight_changed():
    m, x = layer(), torch.randn(3, 30)
    assert m._packed is None
    assert_layer(m, x)
    first = m._packed
    assert_layer(m, x)
    assert m._packed is first
    with torch.no_grad():
        m.weight.mul_(2)  # in place: the version
    assert_layer(m, x)
    m.weight.data = torch.randn(40, 24)  # the same object elsewhere: the address
    assert_layer(m, x)
    m.weight = nn.Parameter(torch.randn(40, 24), requires_grad=False)  # another object
    assert_layer(m, x)
    m.bias.data = torch.randn(40)
    assert_layer(m, x)
    m.load_state_dict({"weight": torch.randn(40, 24), "bias": torch.randn(40)})
    assert_layer(m, x)
    m.load_state_dict({"weight": torch.randn(40, 24), "bias": torch.randn(40)}, assign=True)
    assert_layer(m, x)
    assert m._packed is not first


@native
def test_packed_ahead_of_the_first_call():
    m = layer()
    assert m.pack() is m
    ready = m._packed
    assert ready is not None
    m(torch.randn(3, 30))
    assert m._packed is ready


@native
def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        m, x = layer(), torch.randn(3, 30)
        assert_layer(m, x)
        assert_layer(m, x)
        m.load_state_dict({"weight": torch.randn(40, 24), "bias": torch.randn(40)})
        assert_layer(m, x)
        m.weight.mul_(2)  # torch does not count these: pack() says so
        m.pack()
        assert_layer(m, x)
    with torch.no_grad():
        assert_layer(m, torch.randn(3, 30))


def test_conversion_drops_the_packed_weight():
    m, x = layer(), torch.randn(3, 30)
    m(x)
    m.double()
    assert m._packed is None
    got = m(x.double())
    assert got.dtype == torch.float64
    assert (got - expected(m, x)).abs().max() < 1e-13  # float64 is computed in float64, not on the packed copy
    m.float()
    assert_layer(m, x)
    assert m.in_index.dtype == m.out_index.dtype == torch.int64


def test_trains_after_requires_grad():
    m, x = layer().requires_grad_(), torch.randn(3, 30)
    m(x).square().sum().backward()
    y = compact_linear_reference(x, m.weight, m.bias, m.in_index, m.out_index, 80, "gelu")
    grads = torch.autograd.grad(y.square().sum(), (m.weight, m.bias))
    torch.testing.assert_close(m.weight.grad, grads[0])
    torch.testing.assert_close(m.bias.grad, grads[1])
    torch.optim.SGD(m.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert_layer(m, x)
    frozen, leaf = layer(), torch.randn(3, 30, requires_grad=True)
    frozen(leaf).sum().backward()  # a frozen layer still passes the gradient on
    assert leaf.grad is not None and leaf.grad[:, frozen.in_index].abs().min() > 0


def test_copies_and_pickles():
    m, x = layer(), torch.randn(3, 30)
    y = m(x)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert other._packed is None
        assert torch.equal(other(x), y)
        with torch.no_grad():
            other.weight.zero_()
        assert torch.equal(m(x), y)
    assert len(pickle.dumps(m)) < 2.5 * 4 * 40 * 24


@pytest.mark.parametrize("packed", [False, True])
def test_compile_fullgraph_sees_changed_weights(packed):
    m, x, residual = layer(), torch.randn(3, 30), torch.randn(3, 80)
    if packed:
        m.pack()
    compiled = torch.compile(m, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x, residual).double(), expected(m, x, residual), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        m.weight.mul_(3)
    torch.testing.assert_close(compiled(x, residual).double(), expected(m, x, residual), rtol=1e-5, atol=1e-5)
    m.weight.data = torch.randn(40, 24)
    torch.testing.assert_close(compiled(x, residual).double(), expected(m, x, residual), rtol=1e-5, atol=1e-5)
    m.load_state_dict({"weight": torch.randn(40, 24), "bias": torch.randn(40)})
    torch.testing.assert_close(compiled(x, residual).double(), expected(m, x, residual), rtol=1e-5, atol=1e-5)


@native
def test_compiled_inference_runs_the_packed_kernel(monkeypatch):
    from prunekern.ops import compact_linear as function

    module = __import__("sys").modules[function.__module__]
    m, x, calls = layer().pack(), torch.randn(3, 30), []
    run = module._run_packed
    monkeypatch.setattr(module, "_run_packed", lambda *args: (calls.append(1), run(*args))[1])
    with torch.no_grad():
        torch.compile(m, fullgraph=True)(x)
    assert calls


def test_export_keeps_the_plain_weight():
    m, x = layer(), torch.randn(3, 30)
    m(x)
    program = torch.export.export(m, (x,))
    assert {tuple(t.shape) for t in program.state_dict.values()} == {(40, 24), (40,)}
    torch.testing.assert_close(program.module()(x), m(x))


def test_meta_weights_real_indices():
    real = layer()
    with torch.device("meta"):
        m = CompactLinear(torch.empty(40, 24), torch.empty(40), real.in_index, real.out_index.tolist(), 80, "gelu")
    assert m.weight.is_meta and m.bias.is_meta
    assert torch.equal(m.in_index, real.in_index) and torch.equal(m.out_index, real.out_index)
    assert m.in_index.device.type == "cpu"
    m.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(3, 30)
    assert torch.equal(m(x), real(x))
    assert m(torch.empty(3, 30)).shape == (3, 80)
    assert layer().to("meta")(torch.empty(3, 30, device="meta")).shape == (3, 80)


def test_extra_repr():
    assert repr(layer()) == "CompactLinear(in=24 gathered, out=40 of 80, bias=True, activation=gelu)"
    assert repr(CompactLinear(torch.zeros(2, 3))) == "CompactLinear(in=3, out=2, bias=False, activation=none)"


W = torch.zeros(4, 3)
BAD = {
    "activation": (
        dict(weight=W, activation="sigmoid"),
        "CompactLinear: activation must be one of none, relu, gelu, gelu_tanh, silu, quick_gelu (got 'sigmoid')",
    ),
    "weight 1-D": (dict(weight=torch.zeros(4)), "CompactLinear: weight must have shape [*, *] (got [4])"),
    "weight int": (dict(weight=W.long()), "CompactLinear: weight must be float64"),
    "bias": (dict(weight=W, bias=torch.zeros(5)), "CompactLinear: bias must have shape [4] (got [5])"),
    "no out_features": (
        dict(weight=W, out_index=[0, 1, 2, 3]),
        "CompactLinear: out_features is needed with out_index (got None)",
    ),
    "out_features": (dict(weight=W, out_features=5), "CompactLinear: out_features must be 4"),
    "out_index length": (
        dict(weight=W, out_index=[0, 1, 2], out_features=9),
        "CompactLinear: out_index must have shape [4] (got [3])",
    ),
    "out_index range": (
        dict(weight=W, out_index=[0, 1, 2, 9], out_features=9),
        "CompactLinear: out_index must be sorted and < 9 (got 9 at position 3)",
    ),
    "in_index order": (dict(weight=W, in_index=[0, 2, 1]), "(got 1 at position 2)"),
    "in_index dtype": (
        dict(weight=W, in_index=torch.arange(3, dtype=torch.int32)),
        "CompactLinear: in_index must be int64 (got torch.int32)",
    ),
    "in_index meta": (
        dict(weight=W, in_index=torch.arange(3, device="meta")),
        "CompactLinear: in_index must hold values (got a meta tensor)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    arguments, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        CompactLinear(**arguments)


def test_x_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match="compact_linear: packed must be torch.float64 like x"):
        layer()(torch.randn(3, 30).double())


# --- CompactMLP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(activation, gated):
    up, down, gate = nn.Linear(24, 50), nn.Linear(50, 24), nn.Linear(24, 50) if gated else None
    mlp = CompactMLP(up, down, gate, activation)
    x, residual = torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    act = {
        "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
        "quick_gelu": lambda z: F.silu(1.702 * z) / 1.702,
    }[activation]  # fmt: skip
    with torch.no_grad():
        hidden = act(gate(x)) * up(x) if gated else act(up(x))
        torch.testing.assert_close(mlp(x), down(hidden), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mlp(x, residual), down(hidden) + residual, rtol=1e-4, atol=1e-5)
        # What is generated of the graphs differs by a function alone: one of each shape is compiled to the end.
        backend = "inductor" if activation == "gelu" else "aot_eager"
        torch.compiler.reset()  # what is compiled anew for each activation is counted, and the count has an end
        compiled = torch.compile(mlp, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x, residual), mlp(x, residual))
    assert mlp.up.weight.data_ptr() == up.weight.data_ptr()
    assert copy.deepcopy(mlp)(x).equal(mlp(x))


def test_mlp_of_compact_layers():
    kept = torch.tensor([0, 2, 3])
    down = CompactLinear(torch.randn(3, 4), torch.randn(3), None, kept, 6)
    mlp = CompactMLP(CompactLinear(torch.randn(4, 6)), down, activation="relu")
    x = torch.randn(5, 6)
    y = mlp(x, x)
    assert torch.equal(y[:, [1, 4, 5]], x[:, [1, 4, 5]])  # removed rows: the residual alone
    assert sorted(mlp.state_dict()) == ["down.bias", "down.weight", "up.weight"]


@pytest.mark.parametrize("kind", ["fp32", "int8", "int4"])
def test_gated_mlp_on_plain_weights(kind):
    """What runs on a GPU, whose kernels take the weights as they are."""
    kept = torch.tensor([0, 2, 3])
    gate, up = (CompactLinear(torch.randn(4, 6), bias, weights=kind) for bias in (torch.randn(4), None))
    mlp = CompactMLP(up, CompactLinear(torch.randn(3, 4), None, None, kept, 6, weights=kind), gate, "silu")
    x, residual = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    for added in (None, residual):
        for layer in (mlp.up, mlp.down, mlp.gate):
            layer.activations = "float"  # on a GPU x is not rounded
        got = fused_plain((mlp.up, mlp.down, mlp.gate), x, added, "silu")
        torch.testing.assert_close(got, mlp(x, added), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_hooks_of_an_mlps_layers_are_called(gated):
    up, down, gate = nn.Linear(24, 50), nn.Linear(50, 24), nn.Linear(24, 50) if gated else None
    mlp, x, seen = CompactMLP(up, down, gate, "silu"), torch.randn(2, 7, 24), []
    with torch.no_grad():
        want = mlp(x, x)
        hooks = [m.register_forward_hook(lambda m, args, y: seen.append(m)) for m in mlp.children()]
        torch.testing.assert_close(mlp(x, x), want, rtol=1e-4, atol=1e-5)
        assert set(seen) == set(mlp.children())
        for hook in hooks:
            hook.remove()
        mlp.down.forward = lambda hidden, residual: residual  # as accelerate replaces it
        assert torch.equal(mlp(x, x), x)


def test_mlp_refuses():
    a, b = CompactLinear(torch.zeros(4, 6)), CompactLinear(torch.zeros(6, 4))
    with pytest.raises(ValueError, match=re.escape("activation must be one of none, relu")):
        CompactMLP(a, b, activation="tanh")
    with pytest.raises(TypeError, match=re.escape("up must be CompactLinear or nn.Linear (got ReLU)")):
        CompactMLP(nn.ReLU(), b)
    with pytest.raises(ValueError, match=re.escape("up must have activation none (got relu)")):
        CompactMLP(CompactLinear(torch.zeros(4, 6), activation="relu"), b)
    with pytest.raises(ValueError, match=re.escape("gate must make 4 channels like up (got 5)")):
        CompactMLP(a, b, CompactLinear(torch.zeros(5, 6)))


def test_arrays_are_no_tensors():
    with pytest.raises(TypeError, match=r"CompactLinear: weight must be a torch.Tensor \(got ndarray\)"):
        CompactLinear(torch.zeros(4, 6).numpy())
