"""One logit per channel group, binary in the forward pass (Gumbel-Sigmoid, straight-through)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

# The slope of a sigmoid at 0: open masks weigh in the norm of all gradients as they do once they are drawn.
OPEN_SLOPE = 0.25


class ChannelMask(nn.Module):
    """Binary mask m_b over channel groups.

    In training a group is kept where `logits - threshold + noise > 0`, with logistic noise drawn once per optimiser
    step (`draw`) and held in a buffer, so that a forward pass is deterministic; the gradient is that of
    sigmoid((logits - threshold + noise) / temperature). In eval mode, and once `final`, a group is kept iff
    `logits > threshold`. Source: Gumbel-Sigmoid (Jang et al. 2017; Maddison et al. 2017).

    While `is_open` every group is kept, and the gradient of a logit is that of the mask value itself (times
    OPEN_SLOPE, whatever the logit). `probe` [groups] is then there for the layer to hand to `dora_linear`: its gradient
    sums, token by token, the squares of what the loss loses with a group. `saliency` is what has been gathered of it.

    groups: number of channel groups. row_group: int64 [N], the group of each output channel, or None where group i
    is channel i. Logits are fp32 and start at 1 (all kept, as `threshold` starts at 0).
    """

    threshold: Tensor
    final: Tensor
    saliency: Tensor
    noise: Tensor
    row_group: Tensor | None

    def __init__(self, groups: int, row_group: Tensor | None = None, temperature: float = 1.0):
        super().__init__()
        if groups < 1:
            raise ValueError(f"ChannelMask: groups must be at least 1 (got {groups})")
        if not temperature > 0:
            raise ValueError(f"ChannelMask: temperature must be positive (got {temperature})")
        self.temperature = temperature
        self.logits = nn.Parameter(torch.ones(groups, dtype=torch.float32, device="cpu"))
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device="cpu"))
        self.register_buffer("final", torch.zeros((), dtype=torch.bool, device="cpu"))
        self.register_buffer("saliency", torch.zeros(groups, dtype=torch.float32, device="cpu"))
        self.register_buffer("noise", torch.zeros(groups, dtype=torch.float32, device="cpu"), persistent=False)
        self.register_buffer("row_group", row_group, persistent=False)
        self.is_open = False
        self.probe: Tensor | None = None
        self.is_final = False  # `final` as a Python bool: forward must not wait for a device

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """New logistic noise from `generator` (a CPU generator, so that every device sees the same masks)."""
        uniform = torch.rand(self.noise.shape, generator=generator, dtype=torch.float32, device="cpu").clamp_(
            1e-6, 1 - 1e-6
        )
        self.noise.copy_(uniform.logit_())

    def open(self, is_open: bool) -> None:
        """Keep every group in training, and have a probe for saliency; or no longer."""
        self.is_open = is_open
        self.probe = torch.zeros_like(self.logits, requires_grad=True) if is_open else None

    def probe_rows(self) -> Tensor | None:
        """The probe by output channel [N], while there is one; rows of a group add up their squares."""
        if self.probe is None or not self.training:
            return None
        return self.probe if self.row_group is None else self.probe.index_select(0, self.row_group)

    @torch.no_grad()
    def kept(self) -> Tensor:
        """bool [groups]: the deterministic mask."""
        return self.logits > self.threshold

    @torch.no_grad()
    def finalize(self, kept: Tensor) -> None:
        """Make `kept` (bool [groups]) the mask for good, through a threshold of this mask's own.

        Logits keep their order; where kept and removed ones tie, the kept are lifted by one ulp so that
        `logits > threshold` says exactly `kept`.
        """
        logits = self.logits.data
        if bool(kept.all()):
            threshold = torch.nextafter(logits.min() - 1, logits.new_tensor(-float("inf")))  # below 1e8 - 1 == 1e8, too
        elif not bool(kept.any()):
            threshold = logits.max() + 1
        else:
            threshold = logits[~kept].max()
            low = kept & (logits <= threshold)
            logits[low] = torch.nextafter(threshold, threshold.new_tensor(float("inf")))
        self.threshold.copy_(threshold)
        self.final.fill_(True)
        self.is_final = True
        self.open(False)
        self.logits.requires_grad_(False)

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """m_b by output channel: [N] of zeros and ones."""
        if self.training and self.is_open:
            groups = 1.0 + OPEN_SLOPE * (self.logits - self.logits.detach())
        elif self.training and not self.is_final:
            shifted = self.logits - self.threshold + self.noise
            soft = torch.sigmoid(shifted / self.temperature)
            groups = (shifted > 0).to(soft.dtype) + (soft - soft.detach())  # value exactly 0 or 1, gradient of soft
        else:
            groups = (self.logits > self.threshold).to(self.logits.dtype)
        groups = groups.to(dtype)
        return groups if self.row_group is None else groups.index_select(0, self.row_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self.open(self.is_open)  # on the new device
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.is_final = bool(self.final)
        self.logits.requires_grad_(not self.is_final)
        if self.is_final:
            self.open(False)

    def extra_repr(self) -> str:
        return f"groups={self.logits.numel()}, final={self.is_final}"
