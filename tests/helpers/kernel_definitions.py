"""Float64 definitions that the kernels are held against, interpreted or on a GPU; nothing here calls prunekern."""

import os

import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
UNIT = 2.0**-24  # of fp32 rounding


def random(*shape, seed=5):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def strided(t):
    """The same numbers with other strides: every second column, and row, of something larger."""
    big = t.new_full([2 * n for n in t.shape], 7.0)
    view = big[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def within(got, want, bound):
    excess = (got.double() - want).abs() - bound
    assert got.shape == want.shape, (got.shape, want.shape)
    assert bool((excess <= 0).all()), f"off by {excess.max():.3g} more than the bound"


def dora(x, V, A, B, gain, bias, s):
    """(z, y) in float64."""
    x, V, A, B, gain = (t.double() for t in (x, V, A, B, gain))
    z = x @ (V + s * B @ A).T
    y = gain * z
    return z, y if bias is None else y + bias.double()


def poisoned_empty(monkeypatch):
    """Memory that nobody wrote shows: it is NaN."""
    real = torch.empty

    def empty(*args, **kwargs):
        made = real(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)
