"""CompactLinear: the kept channels of a linear layer, for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunekern import _native
from prunekern.ops import calls, checks
from prunekern.ops.compact_linear import ACTIVATIONS, compact_linear
from prunekern.ops.int4 import dequantize_weight_int4
from prunekern.ops.packing import KIND, WEIGHTS, dequantize_weight, may_pack
from prunekern.ops.quantized import ACTIVATIONS_OF_X, OF_X, TAKE_INT8
from prunekern.ops.seen import is_unchanged

from .buffers import nones_last
from .offloaded import check_codes
from .packed import Packed
from .plain_state import PlainState, rounded_to


class CompactLinear(PlainState):
    """y = scatter(act(gather(x) weight^T + bias)) + residual; see `prunekern.ops.compact_linear`.

    Args:
        weight: [kept_out, kept_in], any float dtype and device ("meta" too). `.weight` is a Parameter that does not
            require a gradient; `requires_grad_()` makes the layer trainable, through the PyTorch reference.
        bias: [kept_out] or None.
        in_index: int64 [kept_in], strictly ascending: the channels of x the weight reads. None: all.
        out_index: int64 [kept_out], strictly ascending: the channels of y the weight makes. None: all.
        out_features: channels of y; needed with out_index.
        activation: none, relu, gelu (erf), gelu_tanh, silu or quick_gelu (z sigmoid(1.702 z)).
        weights: fp32, bf16, int8 or int4: the kind to hold the weight in, as `set_weights` does. None: as it comes.
        activations: auto, float or int8: what becomes of x before it meets the weight, as `compact_linear`
            says. An attribute, which may be changed; int8 needs such a weight.

    The kind of the weight is its dtype. fp32 and bf16 are ordinary parameters. int8 holds `weight` [kept_out, kept_in]
    as an int8 parameter and one float32 `scale` a channel [kept_out], a buffer: a quarter of the memory. int4 holds
    two inputs in a byte, `weight` [kept_out, 16 G] in uint8, and one float16 `scale` for 32 inputs of a channel
    [kept_out, G], G = ceil(kept_in / 32): a seventh. Whatever the kind, `state_dict()` holds a plain floating-point
    weight and the bias, nothing else, and `load_state_dict` takes them (see `PlainState`). `.to(dtype)` changes the
    kind of floating-point weights and leaves int8 and int4 alone.

    On the CPU, for x in float32 or bfloat16 and where no gradient is needed, the C++ kernels run on a packed copy of
    the weight, made by `pack()` or at the first call and made again when the weight changed. Anything else runs the
    PyTorch reference.

    Raises ValueError or TypeError naming the argument.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    scale: Tensor | None
    in_index: Tensor | None
    out_index: Tensor | None
    _parameters: dict[str, Any]  # read in place of the attributes where speed counts
    _buffers: dict[str, Any]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        in_index: Tensor | Sequence[int] | None = None,
        out_index: Tensor | Sequence[int] | None = None,
        out_features: int | None = None,
        activation: str = "none",
        weights: str | None = None,
        activations: str = "auto",
    ):
        super().__init__()
        checks.activation("CompactLinear", activation, ACTIVATIONS)
        checks.tensors("CompactLinear", {"weight": weight}, {"bias": bias})
        checks.shape("CompactLinear", "weight", weight, (None, None))
        checks.floating("CompactLinear", "weight", weight)
        kept_out, kept_in = weight.shape
        if bias is not None:
            checks.shape("CompactLinear", "bias", bias, (kept_out,))
            checks.floating("CompactLinear", "bias", bias)
        if out_features is None:
            if out_index is not None:
                raise ValueError("CompactLinear: out_features is needed with out_index (got None)")
            out_features = kept_out
        if isinstance(out_features, bool) or not isinstance(out_features, int) or not 0 <= out_features < 2**31:
            raise ValueError(f"CompactLinear: out_features must be a whole number below 2^31 (got {out_features!r})")
        if out_index is None and out_features != kept_out:
            raise ValueError(
                f"CompactLinear: out_features must be {kept_out}, the weight's rows, without out_index "
                f"(got {out_features})"
            )
        self.weight = _frozen(weight)
        self.register_buffer("scale", None, persistent=False)
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        device = weight.device if weight.device.type != "meta" else torch.device("cpu")
        self.register_buffer("in_index", _index("in_index", in_index, kept_in, None, device), persistent=False)
        self.register_buffer(
            "out_index", _index("out_index", out_index, kept_out, out_features, device), persistent=False
        )
        nones_last(self)
        self.out_features = out_features
        self.activation = activation
        self.activations = "auto"
        self._packed: Packed | None = None
        self._kept_in = kept_in
        self.set_weights(self.weights if weights is None else weights, activations)

    @property
    def weights(self) -> str:
        """The kind of the weight: fp32, bf16, int8 or int4; for another dtype its name."""
        return KIND.get(self.weight.dtype, str(self.weight.dtype).removeprefix("torch."))

    @property
    def kept_in(self) -> int:
        """Channels the weight reads. The shape of an int4 weight does not tell."""
        weight = self.weight
        return self._kept_in if weight.dtype is torch.uint8 else weight.shape[1]

    def set_weights(self, kind: str, activations: str | None = None) -> CompactLinear:
        """Hold the weight as `kind`, fp32, bf16, int8 or int4, from now on; returns self.

        A new parameter takes the place of the old one and does not require a gradient. What rounding lost does not
        come back. activations: auto, float or int8; None: as they are, or auto where that cannot be. ValueError for
        another kind, for int8 and int4 where the weight holds infinities or NaN, and for int8 activations with other
        weights.
        """
        if kind not in WEIGHTS and kind != self.weights:
            raise ValueError(f"CompactLinear: weights must be one of {', '.join(WEIGHTS)} (got {kind!r})")
        if activations is None:
            activations = "auto" if self.activations == "int8" and kind not in TAKE_INT8 else self.activations
        elif activations not in OF_X:
            accepted = ", ".join(ACTIVATIONS_OF_X)
            raise ValueError(f"CompactLinear: activations must be one of {accepted} (got {activations!r})")
        elif activations == "int8" and kind not in TAKE_INT8:
            raise ValueError(
                f"CompactLinear: activations must be auto or float with {kind} weights (got 'int8'): hold them in int8 "
                "or int4"
            )
        self.activations = ACTIVATIONS_OF_X[OF_X[activations]]  # this very string: `Packed` compares by identity
        if kind == self.weights:
            return self
        weight = self.plain_weight().detach()
        self._kept_in = weight.shape[1]
        self.hold(*rounded_to(kind, weight))
        return self

    def hold(self, weight: Tensor, scale: Tensor | None) -> None:
        """Hold this weight, and its scale where it has one, as they are from now on: what `rounded_to` made of a weight
        [kept_out, kept_in]. `.weight` is a new parameter, which does not require a gradient.
        """
        self.register_parameter("weight", _frozen(weight))
        self.scale, self._packed = scale, None
        nones_last(self)

    def plain_weight(self) -> Tensor:
        """[kept_out, kept_in] in floating point: the weight itself, or what its int8 or int4 values stand for."""
        if self.scale is not None and self.weight.dtype == torch.uint8:
            return dequantize_weight_int4(self.weight, self.scale, self._kept_in)
        return self.weight if self.scale is None else dequantize_weight(self.weight, self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out_features]; residual: [..., out_features] or None."""
        if not isinstance(x, Tensor):
            checks.tensors("CompactLinear", {"x": x}, {})
        return self.run(x, residual, self.activation)

    def run(self, x: Tensor, residual: Tensor | None, activation: str, scatter: bool = True) -> Tensor:
        """`forward` with another activation, or without out_index: [..., kept_out]."""
        parameters, buffers = self._parameters, self._buffers  # a third of the time of self.weight
        try:
            weight, bias, scale = parameters["weight"], parameters["bias"], buffers["scale"]
        except KeyError:  # a parametrisation or a hook computes one of them: it is no parameter now
            weight, bias, scale = self.weight, self.bias, self.scale
        if x.dtype is not _f32 and x.dtype is not weight.dtype:
            x, residual = self._under_autocast(x, residual)
        out_index, n_out = (buffers["out_index"], self.out_features) if scatter else (None, weight.shape[0])
        rest = (buffers["in_index"], out_index, n_out, activation, residual)
        packed = None
        if (x.dtype is _f32 or x.dtype is _bf16) and _AVAILABLE and fuses(x, residual, weight, bias):
            if weight.dtype is _f32 or fits(x, self, weight):
                packed = self.packed()
        if packed is None:
            if scale is not None and not _is_compiling():
                check_codes(self)
            if weight.dtype is torch.uint8 and not fits(x, self, weight):  # the op cannot tell
                got = x.shape[-1] if x.dim() else "a scalar"
                raise ValueError(
                    f"CompactLinear: x must have {self._kept_in} channels, the weight's inputs (got {got})"
                )
            return compact_linear(x, weight, bias, *rest, scale, self.activations)
        if _is_compiling():  # a graph packs nothing, and asks whether the weight changed when it runs
            y: Tensor = torch.ops.prunekern._compact_linear_cached(
                x, weight, packed.weight, packed.numbers[0], bias, *rest, scale, self.activations
            )
            return y
        return compact_linear(x, packed.weight, packed.bias, *rest, packed.scale, packed.activations)

    def packed(self) -> Packed | None:
        """The packed copy of what the layer holds now, made where it must be; None where the weight does not pack.

        Under torch.compile the copy that is there, or None: the graph compares it with the weight when it runs.
        """
        packed, parameters = self._packed, self._parameters
        if _is_compiling():
            return packed if packed is not None and packed.tensors[0] is parameters.get("weight") else None
        if packed is None or not is_unchanged(packed.same, (), packed.seen):  # is_fresh(), without the call
            is_plain = "weight" in parameters and "bias" in parameters  # else someone computes them
            packed = self._packed = Packed((self,)) if is_plain and may_pack(self.weight) else None
        return packed

    def pack(self) -> CompactLinear:
        """Packs the weight now instead of at the first call; returns self. Does nothing where nothing packs.

        Call it before torch.compile: a graph uses the packed weight that is there when it is traced. Writes to the
        weight are seen by themselves; `prunekern.ops.seen` says how, and what can be missed.
        """
        self._packed = Packed((self,)) if may_pack(self.weight) else None
        return self

    def extra_repr(self) -> str:
        """Kept channels, gather and scatter, activation."""
        kept_out = self.weight.shape[0]
        text = f"in={self.kept_in}{' gathered' if self.in_index is not None else ''}, out={kept_out}"
        if self.out_index is not None:
            text += f" of {self.out_features}"
        text += f", bias={self.bias is not None}, activation={self.activation}"
        text = text if self.weight.dtype == torch.float32 else f"{text}, weights={self.weights}"
        return text if self.activations == "auto" else f"{text}, activations={self.activations}"

    def _under_autocast(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """autocast mixes 16-bit products and float32 residuals: bring both to what the layer computes in."""
        if not torch.is_autocast_enabled(x.device.type):
            return x, residual
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return x.to(dtype), None if residual is None else residual.to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry the plain weight only; the copy packs its own.
        return {**self.__dict__, "_packed": None}


_AVAILABLE = _native.available()
_is_compiling = torch.compiler.is_compiling
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
_f32, _bf16 = torch.float32, torch.bfloat16


def packs(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether packed kernels may compute on x, with these parameters of layers: the dtype fits, no gradient."""
    if (x.dtype is not _f32 and x.dtype is not _bf16) or not _AVAILABLE:
        return False
    return fuses(x, residual, *parameters)


def fuses(*tensors: Tensor | None) -> bool:
    """Whether ops for inference may compute on these: no gradient, and no exported program.

    The latter goes to other machines: it keeps the plain weights, layer by layer.
    """
    return not (calls.needs_grad(*tensors) or calls.transformed() or _is_exporting())


def fits(x: Tensor, layer: CompactLinear, weight: Tensor) -> bool:
    """False where x is too wide or narrow for the layer's weight of 16 bits or less: its panels pad inputs, and could
    not tell.
    """
    if weight.dtype is _f32 or layer._buffers["in_index"] is not None:
        return True
    return x.shape[-1:] == (layer._kept_in if weight.dtype is torch.uint8 else weight.shape[1],)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _index(
    name: str, index: Tensor | Sequence[int] | None, length: int, size: int | None, device: torch.device
) -> Tensor | None:
    """Checked here in full, so that a bad layer fails where it is built, with real values even on "meta"."""
    if index is None:
        return None
    if not isinstance(index, Tensor):
        index = torch.tensor(list(index), dtype=torch.int64, device="cpu")
    if index.is_meta:
        raise ValueError(f"CompactLinear: {name} must hold values (got a meta tensor)")
    checks.shape("CompactLinear", name, index, (length,))
    checks.kept_index("CompactLinear", name, index, size)
    return index.detach().to(device)
