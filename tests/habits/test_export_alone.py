"""torch.export, AOTInductor, deepcopy and pickle of every module by itself, fresh and after a call."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from prunekern.exporting.plain import PlainLinear
from prunekern.nn import ChannelMask, CompactAttention, CompactLinear, CompactMLP, MaskedDoRALinear

# In bf16 already: where the CPU multiplies bf16 by bf16, x is rounded to it, which programs that go elsewhere do not.
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16().float()
KEPT, PLACES = [0, 2, 3, 7], [0, 3, 4, 6, 8, 9]
NOTHING = torch.zeros(0, dtype=torch.int64)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (
            CompactLinear(torch.randn(4, 8), torch.randn(4), None, [0, 1, 4, 5], 8) for _ in range(3)
        )
        self.attention = CompactAttention((0, 2, 4), (0, 2, 4), 0.5)

    def forward(self, x):
        return self.attention(x[None], (self.q, self.k, self.v))


def linear(kind="fp32", gathers=False, scatters=False, bias=True, activation="none"):
    weight = torch.randn(6, 4 if gathers else 8)
    indices = KEPT if gathers else None, PLACES if scatters else None, 12 if scatters else None
    # A program that is exported multiplies in fp32 where `auto` may round x: ask for the same.
    return CompactLinear(weight, torch.randn(6) if bias else None, *indices, activation, kind, "float")


def mlp(kind="fp32", gate=False):
    down = CompactLinear(torch.randn(4, 6), None, None, [0, 2, 5, 6], 8, weights=kind)
    third = (CompactLinear(torch.randn(6, 8), weights=kind),) if gate else ()
    return CompactMLP(CompactLinear(torch.randn(6, 8), weights=kind), down, *third, activations="float")


def masked(norm_grad="detached", dropout=0.0):
    options = {"rank": 2, "alpha": 4, "mask": ChannelMask(9), "norm_grad": norm_grad, "dropout": dropout}
    return MaskedDoRALinear(torch.randn(9, 8), torch.randn(9), **options)


def plain():
    weight, bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6))
    return PlainLinear(weight, bias, None, torch.tensor(PLACES), 12, "gelu")


MODULES = {
    **{
        f"linear {kind}{' gathers' * g}{' scatters' * s}": (lambda kind=kind, g=g, s=s: linear(kind, bool(g), bool(s)))
        for kind in ("fp32", "bf16", "int8", "int4")
        for g in (0, 1)
        for s in (0, 1)
    },
    "linear without bias": lambda: linear(bias=False, scatters=True),
    "linear gelu": lambda: linear(scatters=True, activation="gelu"),
    "no rows": lambda: CompactLinear(torch.randn(0, 8), None, None, NOTHING, 5),
    "no columns": lambda: CompactLinear(torch.randn(5, 0), torch.randn(5), NOTHING),
    "mlp": mlp,
    "mlp int8": lambda: mlp("int8"),
    "mlp int4": lambda: mlp("int4"),
    "gated mlp": lambda: mlp(gate=True),
    "attention": Attends,
    "masked": masked,
    "masked full norm": lambda: masked("full"),
    "masked dropout": lambda: masked(dropout=0.1),
    "plain": plain,
}


def made(name, called):
    torch.manual_seed(0)
    module = MODULES[name]().eval()
    if called:
        with torch.no_grad():
            module(X)
    return module


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("name", MODULES)
def test_export(name, called):
    module = made(name, called)
    other = torch.randn(9, 8).bfloat16().float()
    with torch.no_grad():
        want = module(X), module(other)
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(module, (X,), dynamic_shapes=({0: rows},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        for exported in (program.module(), torch.export.load(buffer).module()):
            for x, y in zip((X, other), want, strict=True):
                torch.testing.assert_close(exported(x), y, rtol=1e-4, atol=1e-4)
        strict = torch.export.export(module, (X,), strict=True).module()
        torch.testing.assert_close(strict(X), want[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module(X), want[0], rtol=1e-5, atol=1e-5)  # as before


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name, called):
    module = made(name, called)
    with torch.no_grad():
        want = module(X)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(X), want)
            for parameter in twin.parameters():
                parameter.zero_()
            assert torch.equal(module(X), want)  # nothing is shared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear fp32 scatters", "masked"])
def test_ahead_of_time_inductor(name, tmp_path):
    module = made(name, True)
    with torch.no_grad():
        program = torch.export.export(module, (X,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "module.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(X), module(X), rtol=1e-4, atol=1e-4)
