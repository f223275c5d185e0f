"""MaskedDoRALinear against PEFT's DoRA and the definition in float64."""

import pytest
import torch
from torch import nn

from prunekern.nn import ChannelMask, MaskedDoRALinear
from tests.helpers.masked_dora import K, N, close, definition, dense, trained

torch.set_num_threads(1)


# -- the start -------------------------------------------------------------------------------------------------


def test_starts_as_the_dense_layer():
    weight, bias = dense()
    layer = MaskedDoRALinear(weight, bias, rank=4)
    x = torch.randn(5, K)
    assert (layer.B == 0).all() and layer.A.shape == (4, K) and layer.B.shape == (N, 4)
    torch.testing.assert_close(layer.magnitude.double(), weight.double().norm(dim=1), rtol=1e-6, atol=0)
    close(layer(x), nn.functional.linear(x.double(), weight.double(), bias.double()), torch.float32)


def test_what_trains_and_what_is_frozen():
    layer = trained(masked=True)
    training = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert training == {"A", "B", "magnitude", "mask.logits"}
    assert set(layer.state_dict()) == {
        *("weight", "bias", "A", "B", "magnitude"),
        *("mask.logits", "mask.saliency", "mask.threshold", "mask.final", "mask.saliency"),
    }


def test_adapters_of_16_bit_weights_are_fp32():
    for dtype in (torch.bfloat16, torch.float16):
        layer = MaskedDoRALinear(*dense(dtype), rank=4)
        assert {layer.A.dtype, layer.B.dtype, layer.magnitude.dtype, layer.inv_norm.dtype} == {torch.float32}
        y = layer(torch.randn(5, K).to(dtype))
        assert y.dtype == dtype and torch.isfinite(y).all()


# -- against PEFT ----------------------------------------------------------------------------------------------


def peft_twin(layer):
    """PEFT's own DoRA layer with the same numbers."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear

    base = nn.Linear(K, N, bias=layer.bias is not None, dtype=layer.weight.dtype)
    config = LoraConfig(r=layer.rank, lora_alpha=layer.scale * layer.rank, use_dora=True, lora_dropout=0.0)
    with torch.no_grad():
        base.weight.copy_(layer.weight)
        if layer.bias is not None:
            base.bias.copy_(layer.bias)
    twin = LoraLinear(base, "default", config=config, r=layer.rank, lora_alpha=layer.scale * layer.rank)
    twin = twin.to(layer.weight.dtype)
    A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
    magnitude = twin.lora_magnitude_vector["default"].weight
    assert twin.use_dora["default"] and magnitude.shape == (N,)
    with torch.no_grad():
        A.copy_(layer.A)
        B.copy_(layer.B)
        magnitude.copy_(layer.magnitude)
    return twin, {"A": A, "B": B, "magnitude": magnitude}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_peft_dora_forward_and_gradients(dtype, tolerance, bias, masked):
    layer = trained(dtype, bias=bias)
    if masked:
        layer.mask = ChannelMask(N)  # all on
    twin, theirs = peft_twin(layer)
    twin.train()
    layer.train()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, K, generator=g, dtype=dtype)
    dy = torch.randn(2, 7, N, generator=g, dtype=dtype)
    xs = [x.clone().requires_grad_(True) for _ in range(2)]
    ours, want = layer(xs[0]), twin(xs[1])
    ours.backward(dy)
    want.backward(dy)
    pairs = {"y": (ours, want), "x": (xs[0].grad, xs[1].grad)}
    pairs |= {n: (getattr(layer, n).grad, p.grad) for n, p in theirs.items()}
    for name, (got, other) in pairs.items():
        assert other.abs().max() > 0.1, name  # the comparison must be about something
        assert (got - other).abs().max() <= tolerance * other.abs().max(), name


# -- the equation and its gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_matches_definition_with_masks(norm_grad, bias, training):
    for dtype in (torch.float32, torch.float64):
        layer = trained(dtype, masked=True, bias=bias, norm_grad=norm_grad).train(training)
        x = torch.randn(3, 5, K, dtype=dtype)
        kept = (torch.arange(N) % 3 != 0).double()
        close(layer(x), definition(layer, x, kept), dtype)


def test_pruned_channel_outputs_exactly_zero_bias_included():
    layer = trained(masked=True).eval()
    y = layer(torch.randn(64, K))
    assert (y[:, ::3] == 0).all()
    assert (y.abs().amax(0)[torch.arange(N) % 3 != 0] > 0).all()
    assert (layer.bias.abs() > 0).all()  # or the first line would say little


def test_gradcheck_with_the_whole_norm():
    layer = trained(torch.float64, norm_grad="full", rank=2)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)

    def f(x, A, B, magnitude):
        return torch.func.functional_call(layer, {"A": A, "B": B, "magnitude": magnitude}, (x,))

    leaves = (x, *(p.detach().clone().requires_grad_(True) for p in (layer.A, layer.B, layer.magnitude)))
    assert torch.autograd.gradcheck(f, leaves)


def test_gradcheck_sees_a_norm_taken_as_constant():
    """The check above must be able to fail: with the norm detached, A's gradient is not that of the function."""
    layer = trained(torch.float64, norm_grad="detached", rank=2)
    x = torch.randn(4, K, dtype=torch.float64)

    def f(B):
        return torch.func.functional_call(layer, {"B": B.clone()}, (x,))  # a clone: gradcheck writes through .data

    leaf = layer.B.detach().clone().requires_grad_(True)
    assert not torch.autograd.gradcheck(f, (leaf,), raise_exception=False)


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_gradients_match_definition_by_autograd(norm_grad):
    """Against plain autograd through the written-out equation, with masks and a trained layer, in float64."""
    layer = trained(torch.float64, masked=True, norm_grad=norm_grad).train()
    layer.mask.draw(torch.Generator().manual_seed(4))
    x = torch.randn(6, K, dtype=torch.float64)
    layer(x).square().sum().backward()

    A, B, m = (p.detach().clone().requires_grad_(True) for p in (layer.A, layer.B, layer.magnitude))
    logits = layer.mask.logits.detach().clone().requires_grad_(True)
    soft = torch.sigmoid(logits + layer.mask.noise)
    m_b = ((logits + layer.mask.noise > 0).float() + (soft - soft.detach())).double()
    W = layer.weight + layer.scale * B @ A
    norm = W.norm(dim=1)
    norm = norm.detach() if norm_grad == "detached" else norm
    y = x @ ((m_b * m / norm)[:, None] * W).T + m_b * layer.bias
    y.square().sum().backward()
    for name, got, want in (
        ("A", layer.A.grad, A.grad),
        ("B", layer.B.grad, B.grad),
        ("magnitude", layer.magnitude.grad, m.grad),
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()), msg=name)
    want = logits.grad
    assert 0 < int((m_b == 0).sum()) < N
    torch.testing.assert_close(layer.mask.logits.grad, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    # y^2 has no slope where y = 0: a pruned channel's logit moves through a loss that reads it, as below.
    layer.zero_grad()
    layer(x).sum().backward()
    assert (layer.mask.logits.grad != 0).all()


# -- dropout, autocast, compile, checkpointing -----------------------------------------------------------------


def test_dropout_acts_on_the_low_rank_branch_only():
    layer = trained(torch.float64, dropout=0.5).train()
    x = torch.randn(7, K, dtype=torch.float64)
    torch.manual_seed(11)
    dropped = nn.functional.dropout(x, 0.5, training=True)
    V, A, B = (t.detach() for t in (layer.weight, layer.A, layer.B))
    gain = layer.magnitude / (V + layer.scale * B @ A).norm(dim=1)
    want = gain * (x @ V.T + layer.scale * dropped @ A.T @ B.T) + layer.bias
    torch.manual_seed(11)
    torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
    layer.eval()
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-10)


def test_dropout_at_the_start_changes_nothing():
    layer = MaskedDoRALinear(*dense(torch.float64), rank=4, dropout=0.9).train()
    x = torch.randn(7, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-10, atol=1e-10)  # B is zero


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_cpu_autocast_keeps_the_norm_in_fp32(norm_grad):
    layer = trained(masked=True, norm_grad=norm_grad).train()
    want = layer.gain(layer.mask_values()).detach()
    with torch.no_grad():
        layer.B.add_(0)  # the norm is asked for again inside
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gain = layer.gain(layer.mask_values())
        y = layer(torch.randn(5, K))
    assert gain.dtype == torch.float32 and y.dtype == torch.bfloat16
    torch.testing.assert_close(gain.detach(), want, rtol=1e-6, atol=0)
    y.float().sum().backward()
    assert torch.isfinite(layer.A.grad).all() and layer.A.grad.dtype == torch.float32


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
@pytest.mark.parametrize("training", [True, False])
def test_compile_fullgraph(norm_grad, training):
    layer = trained(masked=True, norm_grad=norm_grad, dropout=0.0).train(training)
    x = torch.randn(5, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if training else "aot_eager")

    def run(f):
        layer.zero_grad()
        y = f(x)
        y.square().sum().backward()
        return [y.detach(), layer.A.grad, layer.B.grad, layer.magnitude.grad]

    for got, want in zip(run(compiled), run(layer), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_gradient_checkpointing_sees_the_same_masks():
    layer = trained(masked=True).train()
    layer.mask.draw(torch.Generator().manual_seed(2))
    x = torch.randn(5, K)

    def grads(run):
        layer.zero_grad()
        run().square().sum().backward()
        return [p.grad.clone() for p in layer.parameters() if p.requires_grad]

    plain = grads(lambda: layer(x))
    again = grads(lambda: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# -- merge, refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
def test_merged_is_the_layer(norm_grad):
    layer = trained(torch.float64, masked=True, norm_grad=norm_grad).eval()
    x = torch.randn(5, K, dtype=torch.float64)
    rows = torch.tensor([0, 1, 5, 28])
    weight, bias = layer.merged(rows)
    torch.testing.assert_close(x @ weight.T + bias, definition(layer, x)[:, rows], rtol=1e-10, atol=1e-10)
    whole, whole_bias = layer.merged()
    torch.testing.assert_close(x @ whole.T + whole_bias, definition(layer, x), rtol=1e-10, atol=1e-10)
    assert whole_bias.data_ptr() != layer.bias.data_ptr()  # the layer's own bias is not handed out
    cols = torch.tensor([3, 4])
    # Another shape of product may sum in another order.
    torch.testing.assert_close(layer.merged(rows, cols)[0], weight[:, cols], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rank", [0, -1, K + 1])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank must be in 1..{K} for a \[{N}, {K}\] weight \(got {rank}\)"):
        MaskedDoRALinear(*dense(), rank=rank)


def test_other_refusals():
    weight, bias = dense()
    with pytest.raises(ValueError, match=r"norm_grad must be 'detached' or 'full' \(got 'half'\)"):
        MaskedDoRALinear(weight, bias, norm_grad="half")
    with pytest.raises(ValueError, match=rf"bias must have shape \[{N}\] \(got \[{N - 1}\]\)"):
        MaskedDoRALinear(weight, bias[:-1])
