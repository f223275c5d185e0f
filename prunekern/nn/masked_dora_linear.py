"""A frozen linear layer under DoRA whose magnitude carries a channel mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops import calls, checks
from ..ops.dora_gain import factored_inv_norm
from ..ops.seen import ALL, FEW, Seen
from .channel_mask import ChannelMask
from .merging import merge

if TYPE_CHECKING:
    from typing_extensions import Self
_LOOKS = FEW, ALL, ALL  # at V, which is frozen and large; at A and B


class MaskedDoRALinear(nn.Module):
    """W'_p = (m_b * m)(V + s B A) / ||V + s B A||, with V = `weight` [N, K] frozen (ASP-DAC 2025; DoRA 2024).

    Parameters: A [r, K] (Kaiming uniform), B [N, r] (zero), magnitude [N] (row norms of V); bias [N] frozen.
    mask: the `ChannelMask` of this layer's output channels, or None where it carries none. A pruned channel outputs
    exactly zero, bias included. norm_grad "detached" takes the row norm as a constant in the backward pass and
    caches it until A, B or V change; "full" differentiates through it and computes it at every forward.
    Dropout acts on the input of the low-rank branch only.
    """

    v_sqnorm: Tensor
    inv_norm: Tensor
    _narrow: Tensor | None = None  # weight in the dtype of autocast
    # While this is not None the layer is what training began with (`pruning.original`): V, for an empty tuple, or V
    # with (A, B, gain) of then.
    began: tuple[()] | tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        mask: ChannelMask | None = None,
        norm_grad: str = "detached",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        checks.tensors("MaskedDoRALinear", {"weight": weight}, {"bias": bias})
        checks.shape("MaskedDoRALinear", "weight", weight, (None, None))
        checks.floating("MaskedDoRALinear", "weight", weight)
        N, K = weight.shape
        if rank < 1 or rank > min(N, K):
            raise ValueError(f"MaskedDoRALinear: rank must be in 1..{min(N, K)} for a [{N}, {K}] weight (got {rank})")
        if norm_grad not in ("detached", "full"):
            raise ValueError(f"MaskedDoRALinear: norm_grad must be 'detached' or 'full' (got {norm_grad!r})")
        if bias is not None and tuple(bias.shape) != (N,):
            raise ValueError(f"MaskedDoRALinear: bias must have shape [{N}] (got {list(bias.shape)})")
        self.out_features, self.in_features, self.rank = N, K, rank
        self.dense_shape = (N, K)  # what it stays when pruned channels are dropped
        self.scale, self.norm_grad = alpha / rank, norm_grad
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        device = weight.device
        a = torch.empty(rank, K, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(device))
        self.B = nn.Parameter(torch.zeros(N, rank, dtype=dtype, device=device))
        self.register_buffer("v_sqnorm", ops.row_sqnorm(self.weight), persistent=False)
        self.magnitude = nn.Parameter(self.v_sqnorm.sqrt())
        self.register_buffer("inv_norm", torch.zeros(N, dtype=dtype, device=device), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.mask = mask
        self._seen: tuple[Seen, ...] | None = None  # (weight, A, B) that inv_norm was computed from
        self.refresh()

    def set_low_rank(self, rank: int, scale: float) -> None:
        """Another rank and scale than the constructor's. With another rank A and B are new, zero, to be loaded."""
        if rank < 1 or rank > min(self.dense_shape):
            raise ValueError(f"MaskedDoRALinear: rank must be in 1..{min(self.dense_shape)} (got {rank})")
        if rank != self.rank:
            self.A = nn.Parameter(self.A.new_zeros(rank, self.in_features))
            self.B = nn.Parameter(self.B.new_zeros(self.out_features, rank))
        self.rank, self.scale = rank, float(scale)
        self.refresh()

    # Inference mode off: a cache first filled by an evaluation must not become a tensor that cannot be trained with.
    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the cached row norm. Called at every optimiser step, and by forward when A, B or V changed."""
        now = (self.weight, self.A, self.B)
        if self._seen is None or not self._seen[0].holds(self.weight):
            self.v_sqnorm, self._narrow = ops.row_sqnorm(self.weight), None
        if self._seen is None:
            self._seen = tuple(Seen(tensor, look) for tensor, look in zip(now, _LOOKS, strict=True))
        else:  # they keep their numbers: compiled graphs know these
            for seen, tensor, look in zip(self._seen, now, _LOOKS, strict=True):
                seen.look(tensor, look)
        _, inv_norm = ops.dora_gain(self.weight, self.A, self.B, self.magnitude, None, self.scale, self.v_sqnorm)
        if self.inv_norm.dtype == inv_norm.dtype:
            self.inv_norm.copy_(inv_norm)  # in place: a compiled graph reads this buffer
        else:
            self.inv_norm = inv_norm  # the module was cast to 16 bit: gain stays fp32

    def forget_norm(self) -> None:
        """Let the next `refresh` compute all anew, whatever it seems to know."""
        self._seen = self._narrow = None

    def _row_norm(self) -> Tensor:
        """1 / ||V + s B A|| [N] of the parameters as they are now; a constant unless norm_grad is "full"."""
        V: Tensor = self.weight
        A: Tensor = self.A
        B: Tensor = self.B
        if calls.transformed():  # nothing is kept of what a functional transform hands in
            squares = ops.row_sqnorm(V)
            if self.norm_grad == "detached":
                V, A, B = V.detach(), A.detach(), B.detach()
            return factored_inv_norm(V, A, B, self.scale, squares)
        if torch.compiler.is_compiling():
            if self.norm_grad == "full" or self._seen is None:
                squares = ops.row_sqnorm(V)
                if self.norm_grad == "detached":
                    V, A, B = V.detach(), A.detach(), B.detach()
                return factored_inv_norm(V, A, B, self.scale, squares)
            numbers = [seen.number for seen in self._seen]
            inv_norm: Tensor = torch.ops.prunekern._inv_norm_cached(
                V.detach(), A.detach(), B.detach(), self.scale, self.inv_norm, numbers
            )
            return inv_norm
        # |V|^2 is all that norm_grad "full" reads of the cache.
        count = 1 if self.norm_grad == "full" else 3
        if self._seen is None or not all(
            seen.holds(tensor) for seen, tensor in zip(self._seen[:count], (V, A, B), strict=False)
        ):
            self.refresh()
        if self.norm_grad == "full":
            return factored_inv_norm(V, A, B, self.scale, self.v_sqnorm)
        return self.inv_norm

    def _frozen(self) -> Tensor:
        """V as the product takes it; in training under CPU autocast a copy in its dtype, made once for as long as V
        stays. Each step would make one, and hold it until its backward pass: this one is held between steps, too.
        """
        V: Tensor = self.weight
        if not calls.unwatched() or torch.compiler.is_compiling():  # tensors of a tracer, not to be kept
            return V
        trains = self.training and torch.is_grad_enabled() and not V.requires_grad
        if not (trains and V.is_cpu and V.dtype is torch.float32 and torch.is_autocast_enabled("cpu")):
            self._narrow = None
            return V
        if self._seen is None or not self._seen[0].holds(V):
            return V
        dtype = torch.get_autocast_dtype("cpu")
        if self._narrow is None or self._narrow.dtype is not dtype:
            self._narrow = V.detach().to(dtype)
        return self._narrow

    def mask_values(self) -> Tensor | None:
        """m_b [N] as the forward pass uses it now, or None where this layer carries no mask."""
        return None if self.mask is None else self.mask(self.magnitude.dtype)

    def gain(self, m_b: Tensor | None) -> Tensor:
        """m_b * m / ||V + s B A||, [N]."""
        gain = self.magnitude * self._row_norm()
        return gain if m_b is None else m_b * gain

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.began is not None:
            return self._before(x, self.began)
        m_b = self.mask_values()
        bias = self.bias if self.bias is None or m_b is None else m_b * self.bias
        x_lora = self.dropout(x) if self.training and self.dropout.p > 0 else None
        probe = None if m_b is None or self.mask is None else self.mask.probe_rows()
        gain = self.gain(m_b)  # before V: it looks whether V is still what it was
        return ops.dora_linear(x, self._frozen(), self.A, self.B, gain, bias, self.scale, x_lora, probe)

    def _before(self, x: Tensor, began: tuple[()] | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Without a mask; x [..., K] -> [..., N]."""
        if not began:
            return F.linear(x, self.weight, self.bias)
        A, B, gain = began
        return ops.dora_linear(x, self.weight, A, B, gain, self.bias, self.scale)

    @torch.no_grad()
    def merged(self, rows: Tensor | None = None, cols: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The plain weight and bias of kept rows and columns (int64, sorted). Masks do not enter: rows select."""
        device = self.weight.device
        rows = rows if rows is None else rows.to(device)
        cols = cols if cols is None else cols.to(device)
        weight = merge(self.weight, self.A, self.B, self.magnitude, self.scale, rows, cols)
        bias = self.bias if self.bias is None or rows is None else self.bias.index_select(0, rows)
        return weight, bias if bias is None else bias.detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        self.forget_norm()  # moved or cast
        self.refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None, "_narrow": None}  # a copy has tensors of its own

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, norm_grad={self.norm_grad!r}"
