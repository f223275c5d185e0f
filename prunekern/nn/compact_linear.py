"""CompactLinear: the kept channels of a linear layer, for deployment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekern import _native
from prunekern.ops import _checks
from prunekern.ops.compact_linear import ACTIVATIONS, compact_linear, pack_weight, version_of


class CompactLinear(nn.Module):
    """y = scatter(act(gather(x) weight^T + bias)) + residual; see `prunekern.ops.compact_linear`.

    Args:
        weight: [kept_out, kept_in], any float dtype and device ("meta" too). `.weight` is a Parameter that does not
            require a gradient; `requires_grad_()` makes the layer trainable, through the PyTorch reference.
        bias: [kept_out] or None.
        in_index: int64 [kept_in], strictly ascending: the channels of x the weight reads. None: all.
        out_index: int64 [kept_out], strictly ascending: the channels of y the weight makes. None: all.
        out_features: channels of y; needed with out_index.
        activation: none, relu, gelu (erf), gelu_tanh or silu.

    `state_dict()` holds weight and bias, nothing else. On the CPU, in float32 and where no gradient is needed, the
    C++ kernels run on a packed copy of the weight, made by `pack()` or at the first call and made again when the
    weight changed. Anything else runs the PyTorch reference.

    Raises ValueError or TypeError naming the argument.
    """

    in_index: Tensor | None
    out_index: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        in_index: Tensor | Sequence[int] | None = None,
        out_index: Tensor | Sequence[int] | None = None,
        out_features: int | None = None,
        activation: str = "none",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"CompactLinear: activation must be one of {', '.join(ACTIVATIONS)} (got {activation!r})")
        _checks.shape("CompactLinear", "weight", weight, (None, None))
        _checks.floating("CompactLinear", "weight", weight)
        kept_out, kept_in = weight.shape
        if bias is not None:
            _checks.shape("CompactLinear", "bias", bias, (kept_out,))
        if out_features is None:
            if out_index is not None:
                raise ValueError("CompactLinear: out_features is needed with out_index (got None)")
            out_features = kept_out
        if out_index is None and out_features != kept_out:
            raise ValueError(
                f"CompactLinear: out_features must be {kept_out}, the weight's rows, without out_index "
                f"(got {out_features})"
            )
        self.weight = _frozen(weight)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        device = weight.device if weight.device.type != "meta" else torch.device("cpu")
        self.register_buffer("in_index", _index("in_index", in_index, kept_in, None, device), persistent=False)
        self.register_buffer(
            "out_index", _index("out_index", out_index, kept_out, out_features, device), persistent=False
        )
        self.out_features = out_features
        self.activation = activation
        self._cache: _Cache | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out_features]; residual: [..., out_features] or None."""
        return self.run(x, residual, self.activation)

    def run(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """`forward` with another activation: how CompactMLP fuses its own."""
        parameters, buffers = self._parameters, self._buffers  # a third of the time of self.weight
        weight, bias = parameters["weight"], parameters["bias"]
        rest = (bias, buffers["in_index"], buffers["out_index"], self.out_features, activation, residual)
        if not self._can_pack(x, weight, bias, residual):
            if x.dtype != weight.dtype and torch.is_autocast_enabled(x.device.type):
                x = x.to(weight.dtype)
                rest = (*rest[:-1], None if residual is None else residual.to(weight.dtype))
            return compact_linear(x, weight, *rest)
        cache = self._cache
        if _is_compiling():  # a graph packs nothing, and compares address and version when it runs
            if cache is None or cache.weight is not weight:
                return compact_linear(x, weight, *rest)
            return torch.ops.prunekern._compact_linear_cached(
                x, weight, cache.packed, cache.address, cache.version, *rest
            )
        if cache is None or not cache.is_of(weight):
            cache = self._cache = _Cache(weight)
        return compact_linear(x, cache.packed, *rest)

    def pack(self) -> CompactLinear:
        """Packs the weight now instead of at the first call; returns self. Does nothing where nothing packs.

        Call it before torch.compile (a graph uses the packed weight that is there when it is traced), and after
        changing, in place, a weight made under inference_mode (torch does not count changes of those).
        """
        weight = self.weight
        if weight.dtype == torch.float32 and weight.device.type == "cpu" and _native.available():
            self._cache = _Cache(weight)
        return self

    def extra_repr(self) -> str:
        """Kept channels, gather and scatter, activation."""
        kept_out, kept_in = self.weight.shape
        text = f"in={kept_in}{' gathered' if self.in_index is not None else ''}, out={kept_out}"
        if self.out_index is not None:
            text += f" of {self.out_features}"
        return f"{text}, bias={self.bias is not None}, activation={self.activation}"

    @staticmethod
    def _can_pack(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
        if x.dtype is not _f32 or weight.dtype is not _f32 or not weight.is_cpu or not x.is_cpu:
            return False
        if _grad_enabled() and (
            x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return False
        # An exported program goes to other machines: it keeps the plain weight.
        return _AVAILABLE and not _is_exporting()

    def _apply(self, fn, recurse=True):
        self._cache = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._cache = None
        return super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):
        # Copies and pickles carry the plain weight only; the copy packs its own.
        return {**self.__dict__, "_cache": None}


class _Cache:
    """A packed weight and what it was packed from: good while weight is the same object, place and version."""

    __slots__ = ("weight", "alive", "address", "version", "packed")

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.alive = weight.detach()  # keeps the address from being given to something else
        self.address = weight.data_ptr()
        self.version = version_of(weight)
        self.packed = pack_weight(weight)

    def is_of(self, weight: Tensor) -> bool:
        """Whether `packed` is still this weight."""
        return self.weight is weight and self.address == weight.data_ptr() and self.version == version_of(weight)


_AVAILABLE = _native.available()
_is_compiling = torch.compiler.is_compiling
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
_grad_enabled = torch.is_grad_enabled
_f32 = torch.float32


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _index(name: str, index, length: int, size: int | None, device: torch.device) -> Tensor | None:
    """Checked here in full, so that a bad layer fails where it is built, with real values even on "meta"."""
    if index is None:
        return None
    if not isinstance(index, Tensor):
        index = torch.tensor(list(index), dtype=torch.int64, device="cpu")
    if index.is_meta:
        raise ValueError(f"CompactLinear: {name} must hold values (got a meta tensor)")
    _checks.shape("CompactLinear", name, index, (length,))
    _checks.kept_index("CompactLinear", name, index, size)
    return index.detach().to(device)
