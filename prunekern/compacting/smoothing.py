"""Large channels of what layers read made smaller before 8 bits round them, and the weights that read them larger.

Xiao et al., SmoothQuant (2023): a channel's factor is max |x|^a / max |w|^(1 - a). A row of x is rounded with one
scale, which a channel twenty times as large as the rest takes for itself; weights have a scale for every output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import families
from ..families.decoders.smoothing import Smoothing, smoothings
from .listening import Listener
from .plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How much of a channel's size the weights take over: the best of these for each place. 0: nothing is scaled.
SHARES = (0.0, 0.35, 0.5, 0.65, 0.8)
TRIED_ROWS = 256
_LEAST, _MOST = 1e-3, 1e3  # of a factor, about 1 in the geometric mean

# What noise a layer makes with rows x [rows, K] and a weight [N, K], both rounded: relative to its signal.
Noise = Callable[[Tensor, Tensor], float]


class Largest(Listener):
    """The largest |x| of every column that a layer reads, `top` [K], and its first rows, `some` [TRIED_ROWS, K]; None
    before it saw any.
    """

    top: Tensor | None = None
    some: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """See `Listener`."""
        top = x.abs().amax(0)
        self.top = top if self.top is None else torch.maximum(self.top, top)
        had = 0 if self.some is None else len(self.some)
        if had < TRIED_ROWS:
            more = x[: TRIED_ROWS - had]
            self.some = more.clone() if self.some is None else torch.cat([self.some, more])


def smoothings_of(model: PreTrainedModel, plan: Plan) -> list[Smoothing]:
    """Where a compact model can be smoothed: nowhere, in an encoder."""
    from ..families.decoders import llama

    return list(smoothings(model, plan)) if families.of(model) is llama else []


@torch.no_grad()
def smooth(model: PreTrainedModel, where: list[Smoothing], seen: Mapping[str, Largest], noise: Noise) -> None:
    """Scale channels in place where that makes less noise, by what was `seen` of the layers' inputs. The model computes
    what it did, up to rounding.
    """
    for one in where:
        largest, readers = seen[one.readers[0]], [model.get_submodule(name) for name in one.readers]
        top, x = largest.top, largest.some
        if top is None or x is None or not all(_reads(layer, top) for layer in readers):
            continue
        heavy = torch.stack([layer.weight.abs().amax(0) for layer in readers]).amax(0)  # [columns]
        channels = len(one.made[0])
        at = torch.arange(channels, device="cpu") if one.at is None else one.at
        at = at.to(heavy.device)
        sizes = _largest_of(top, at, channels), _largest_of(heavy, at, channels)  # [channels]
        found = {}
        for share in SHARES:
            by = _factors(*sizes, share)[at]
            found[share] = sum(noise(x / by, layer.weight * by) for layer in readers)
        by = _factors(*sizes, min(SHARES, key=found.__getitem__))
        for parameter in one.made:
            parameter.div_(by.view(-1, *[1] * (parameter.dim() - 1)))
        for layer in readers:
            layer.weight.mul_(by[at])


def _reads(layer: nn.Module, top: Tensor) -> bool:
    """Whether a layer reads all these columns: one that nothing is left of does not."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1] == len(top) and weight.numel() > 0


def _largest_of(columns: Tensor, at: Tensor, channels: int) -> Tensor:
    """[channels]: the largest entry of those columns that read it; 0 of one that nobody reads."""
    return columns.new_zeros(channels).scatter_reduce_(0, at, columns, "amax")


def _factors(top: Tensor, heavy: Tensor, share: float) -> Tensor:
    some = (top > 0) & (heavy > 0)  # a channel that is always zero, or read by nobody, stays as it is
    if share == 0.0:
        return torch.ones_like(top)
    logs = torch.where(some, share * top.clamp_min(1e-30).log() - (1 - share) * heavy.clamp_min(1e-30).log(), 0.0)
    mean = logs.sum() / some.sum().clamp_min(1)
    return torch.where(some, (logs - mean).exp().clamp(_LEAST, _MOST), 1.0)
