"""The norm that MaskedDoRALinear keeps between calls: never computed twice, never stale."""

import copy
import io

import pytest
import torch
from torch import nn

from prunekern import ops
from prunekern.nn import MaskedDoRALinear
from tests.helpers.masked_dora import K, close, definition, dense, trained


def count_norms(monkeypatch):
    """Calls of the op that computes the norm."""
    calls = []
    real = ops.dora_gain
    monkeypatch.setattr(ops, "dora_gain", lambda *a: calls.append(1) or real(*a))
    return calls


def test_norm_is_not_recomputed_by_forward(monkeypatch):
    layer = trained(masked=True).train()
    layer(torch.randn(2, K))
    calls = count_norms(monkeypatch)
    for training in (True, False):
        layer.train(training)
        for _ in range(3):
            layer(torch.randn(2, K)).sum().backward()
    with torch.no_grad():
        layer.magnitude.mul_(2)  # not part of the norm
        layer.mask.logits.neg_()
    layer(torch.randn(2, K))
    assert not calls
    with torch.no_grad():
        layer.B.mul_(2)
    layer(torch.randn(2, K))
    layer(torch.randn(2, K))
    assert len(calls) == 1


def in_place(name):
    def change(layer):
        with torch.no_grad():
            getattr(layer, name).add_(0.3 * torch.randn(getattr(layer, name).shape))
        return layer

    return change


def optimizer_step(layer):
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(4, K, dtype=layer.weight.dtype)).square().sum().backward()
    optimizer.step()
    return layer


def load(assign):
    def change(layer):
        other = trained(layer.weight.dtype, masked=True, generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            other.B.add_(0.5)
            other.weight.add_(0.5)
        layer.load_state_dict(other.state_dict(), assign=assign)
        return layer

    return change


def load_twice(layer):
    # The second load may hand the new tensor the address of the first: identity alone would call it unchanged.
    load(True)(layer)
    return load(True)(layer)


def replaced(layer):
    layer.B = nn.Parameter(layer.B.detach() * 3)
    return layer


def deep_copied(layer):
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.B.mul_(3)
    return twin


def pickled(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    with torch.no_grad():
        twin.A.mul_(3)
    return twin


CHANGES = {
    "A": in_place("A"),
    "B": in_place("B"),
    "V": in_place("weight"),
    "optimizer": optimizer_step,
    "load_state_dict": load(False),
    "load_state_dict assign": load(True),
    "load_state_dict assign twice": load_twice,
    "parameter replaced": replaced,
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.float64),
    "deepcopy": deep_copied,
    "pickle": pickled,
}


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
@pytest.mark.parametrize("change", CHANGES)
def test_norm_follows_every_change(change, norm_grad):
    torch.manual_seed(0)
    layer = trained(masked=True, norm_grad=norm_grad).eval()
    x = torch.randn(5, K)
    before = layer(x)
    layer = CHANGES[change](layer).eval()
    x = x.to(layer.weight.dtype)
    want = definition(layer, x, layer.mask.kept().double())
    if change not in ("double", "to"):
        assert (before - want).abs().max() > 0.01  # a stale norm would be seen
    close(layer(x), want, layer.weight.dtype)


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_copy_of_a_layer_whose_norm_is_stale(norm_grad):
    """A copy's versions start anew, and may be those the old norm was computed at."""
    layer = MaskedDoRALinear(*dense(), rank=4, norm_grad=norm_grad).eval()
    x = torch.randn(5, K)
    for name in ("B", "weight"):
        in_place(name)(layer)
        twin = copy.deepcopy(layer)
        close(twin(x), definition(layer, x), torch.float32)


def test_norm_follows_functional_call():
    """Temporary parameters stand at the same address call after call, at the same version."""
    layer = trained().eval()
    x = torch.randn(5, K)
    for scale in (1.0, 2.0, 3.0, 4.0):
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.B.mul_(scale)
        want = definition(twin, x)
        del twin
        close(torch.func.functional_call(layer, {"B": layer.B.detach() * scale}, (x,)), want, torch.float32)
    close(layer(x), definition(layer, x), torch.float32)


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_compiled_forward_follows_load_state_dict_and_casts(norm_grad):
    """A compiled graph cannot compare versions: what changes parameters wholesale refreshes the norm itself."""
    layer = trained(masked=True, norm_grad=norm_grad).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    compiled(x)
    load(False)(layer)
    close(compiled(x), definition(layer, x, layer.mask.kept().double()), torch.float32)
    layer.double()
    x = x.double()
    close(compiled(x), definition(layer, x, layer.mask.kept().double()), torch.float64)


def test_first_forward_under_inference_mode_leaves_a_layer_that_trains():
    for norm_grad in ("detached", "full"):
        layer = copy.deepcopy(trained(norm_grad=norm_grad))
        with torch.inference_mode():
            layer(torch.randn(2, K))
        layer.train()(torch.randn(2, K)).sum().backward()
        assert layer.A.grad is not None


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_cast_to_16_bit_keeps_gain_in_fp32(norm_grad):
    layer = trained(norm_grad=norm_grad).bfloat16().eval()
    assert layer.gain(None).dtype == torch.float32
    V, A, B, m = (t.detach().double() for t in (layer.weight, layer.A, layer.B, layer.magnitude))
    want = m / (V + layer.scale * B @ A).norm(dim=1)
    torch.testing.assert_close(layer.gain(None).detach().double(), want, rtol=1e-5, atol=0)


def test_state_dict_holds_no_cache():
    layer = trained()
    assert not {"inv_norm", "v_sqnorm"} & set(layer.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_norm_follows_every_optimiser(fused):
    """Without `Pruner.step`; fused ones leave PyTorch's version counters as they are."""
    layer, x = trained().train(), torch.randn(4, K)
    made = torch.optim.AdamW([layer.A, layer.B], lr=0.3, fused=fused)
    for _ in range(2):
        made.zero_grad()
        layer(x).square().sum().backward()
        made.step()
        close(layer(x), definition(layer, x), torch.float32)
