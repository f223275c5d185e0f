"""MaskedDoRALinear layers as after training, and the definition they must equal."""

import torch

from prunekern.nn import ChannelMask, MaskedDoRALinear

N, K = 29, 23


def dense(dtype=torch.float32, seed=0, bias=True):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g, dtype=torch.float64).to(dtype)
    return weight, torch.randn(N, generator=g, dtype=torch.float64).to(dtype) if bias else None


def trained(dtype=torch.float32, masked=False, bias=True, **kwargs):
    """A layer as after some training: B and magnitude away from their start, a third of the mask pruned."""
    mask = ChannelMask(N) if masked else None
    options = {"rank": 4, "alpha": 6.0, "generator": torch.Generator().manual_seed(3)} | kwargs
    layer = MaskedDoRALinear(*dense(dtype, bias=bias), mask=mask, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.B.copy_(torch.randn(layer.B.shape, generator=g))
        layer.magnitude.mul_(0.5 + torch.rand(N, generator=g))
        if masked:
            mask.logits.copy_(torch.where(torch.arange(N) % 3 == 0, -1.0, 1.0))
    layer.refresh()  # as Pruner.step does
    return layer


def definition(layer, x, kept=None):
    """The equation of docs/how-it-works.md in float64, from the layer's parameters only."""
    V, A, B, m = (t.detach().double() for t in (layer.weight, layer.A, layer.B, layer.magnitude))
    W = V + layer.scale * B @ A
    W = m[:, None] * W / W.norm(dim=1, keepdim=True)
    y = x.double() @ W.T + (0 if layer.bias is None else layer.bias.double())
    return y if kept is None else y * kept


def close(got, want, dtype, length=K):
    """Relative to the largest value: rounding of `length` products and of the norm."""
    error = float((got.double() - want.double()).detach().abs().max())
    assert error <= 4 * length**0.5 * torch.finfo(dtype).eps * float(want.detach().abs().max())
