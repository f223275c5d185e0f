"""CompactMLP: two or three compact linears and the activation between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekern.ops import checks
from prunekern.ops.compact_linear import ACTIVATIONS, activate
from prunekern.ops.compact_mlp import compact_mlp

from .compact_linear import CompactLinear, fits, fuses, packs
from .hooked import is_hooked, is_replaced


class CompactMLP(nn.Module):
    """y = down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate; plus the residual.

    Args:
        up, down, gate: CompactLinear without an activation of their own, or nn.Linear (its weights are shared).
        activation: none, relu, gelu (erf), gelu_tanh, silu or quick_gelu.
        activations: auto, float or int8, for all layers (see `CompactLinear`); None: as they have them.

    One kernel call (`prunekern.ops.compact_mlp`) where `mlp_call` says so, else one call a layer; layers with hooks, or
    another forward in place of theirs, and modules put in their places are called as modules.
    Raises TypeError or ValueError naming the argument.
    """

    gate: CompactLinear | None
    _modules: dict[str, Any]  # read in place of the attributes where speed counts

    def __init__(
        self,
        up: CompactLinear | nn.Linear,
        down: CompactLinear | nn.Linear,
        gate: CompactLinear | nn.Linear | None = None,
        activation: str = "gelu",
        activations: str | None = None,
    ):
        super().__init__()
        checks.activation("CompactMLP", activation, ACTIVATIONS)
        self.up = _compact("up", up)
        self.down = _compact("down", down)
        self.register_module("gate", None if gate is None else _compact("gate", gate))
        self.activation = activation
        if activations is not None:
            for layer in (self.up, self.down, self.gate):
                if layer is not None:
                    layer.set_weights(layer.weights, activations)
        for name, layer in (("up", self.up), ("gate", self.gate)):
            if layer is not None and layer.out_features != self.up.out_features:
                raise ValueError(
                    f"CompactMLP: {name} must make {self.up.out_features} channels like up (got {layer.out_features})"
                )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out_features of down]; residual of that shape or None."""
        if not isinstance(x, Tensor):
            checks.tensors("CompactMLP", {"x": x}, {})
        modules = self._modules
        up, down, gate = modules["up"], modules["down"], modules["gate"]
        layers = (up, down) if gate is None else (up, down, gate)
        if is_hooked(*layers) or is_replaced(*layers):
            hidden = activate(up(x) if gate is None else gate(x), self.activation)
            hidden = hidden if gate is None else hidden * up(x)
            y: Tensor = down(hidden, *([] if is_replaced(down) else [residual]))
            return y if residual is None or not is_replaced(down) else residual + y
        return mlp_call(up, down, x, residual, self.activation, gate)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"


def mlp_call(
    up: CompactLinear,
    down: CompactLinear,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    gate: CompactLinear | None = None,
) -> Tensor:
    """down(act(up(x))), or down(act(gate(x)) * up(x)), plus the residual, of layers that may live anywhere in a model.

    x: [..., in] -> [..., out_features of down]; residual of that shape or None. activation: None for up's own.
    One call of `compact_mlp` where nothing needs a gradient, all layers hold one kind of weight, and down reads just
    what up makes: on the packed weights where x is float32 or bfloat16 on the CPU, on the plain ones of a gated MLP on
    a GPU. Else one call a layer, with the same result up to rounding.
    """
    if activation is None:
        activation = up.activation
    layers = (up, down) if gate is None else (up, down, gate)
    if _fuses(layers, x, residual):
        y = (fused_plain if x.is_cuda else _fused)(layers, x, residual, activation)
        if y is not None:
            return y
    hidden = up.run(x, None, activation if gate is None else "none")
    if gate is not None:
        hidden = gate.run(x, None, activation) * hidden
    out: Tensor = down(hidden, residual)
    return out


def _fuses(layers: tuple[CompactLinear, ...], x: Tensor, residual: Tensor | None) -> bool:
    """Whether `compact_mlp` can compute what the layers do one by one."""
    up, down = layers[0], layers[1]
    weight, last, inputs = up._parameters["weight"], down._parameters["weight"], up._buffers["in_index"]
    dtype = weight.dtype
    if last.dtype is not dtype or up._buffers["out_index"] is not None or down._buffers["in_index"] is not None:
        return False
    if any(layer.activations is not up.activations for layer in layers):
        return False
    if down.activation != "none" or down.kept_in != up.out_features or not fits(x, up, weight):
        return False
    if x.dtype is not _f32 and x.dtype is not dtype and torch.is_autocast_enabled(x.device.type):
        return False  # the layers settle on a dtype themselves
    parameters: tuple[Tensor | None, ...] = (weight, last, up._parameters["bias"], down._parameters["bias"])
    if x.is_cuda and len(layers) == 2:
        return False  # two launches either way
    if len(layers) == 3:
        gate = layers[2]
        if gate._parameters["weight"].dtype is not dtype or gate._buffers["out_index"] is not None:
            return False
        if not _same_index(inputs, gate._buffers["in_index"]):
            return False
        parameters += (gate._parameters["weight"], gate._parameters["bias"])
    if x.is_cuda:
        return fuses(x, residual, *parameters)
    return packs(x, residual, *parameters)


def _fused(layers: tuple[CompactLinear, ...], x: Tensor, residual: Tensor | None, activation: str) -> Tensor | None:
    """None where a layer has no packed weight."""
    up, down = layers[0], layers[1]
    first, last = up.packed(), down.packed()
    third: Any = layers[2].packed() if len(layers) == 3 else _NOTHING
    if first is None or last is None or third is None:
        return None
    rest = (
        up._buffers["in_index"], down._buffers["out_index"], up.out_features, down.out_features, activation, residual
    )  # fmt: skip
    if not _is_compiling():
        return compact_mlp(
            x, first.weight, last.weight, third.weight, first.bias, last.bias, third.bias, first.scale, last.scale,
            third.scale, *rest, first.activations,
        )  # fmt: skip
    packed = (first, last, third)[: len(layers)]
    biases, scales = ([getattr(layer, name) for layer in layers] + [None] for name in ("bias", "scale"))
    y: Tensor = torch.ops.prunekern._compact_mlp_cached(
        x, [layer.weight for layer in layers], [p.weight for p in packed], [p.numbers[0] for p in packed],
        *biases[:3], *scales[:3], *rest, first.activations,
    )  # fmt: skip
    return y


def fused_plain(
    layers: tuple[CompactLinear, ...], x: Tensor, residual: Tensor | None, activation: str
) -> Tensor:  # fmt: skip
    """`compact_mlp` of a gated MLP (up, down, gate) on the plain weights."""
    up, down = layers[0], layers[1]
    first, last, third = (layer._parameters for layer in layers)
    (up_scale, down_scale, gate_scale), index = (layer._buffers["scale"] for layer in layers), up._buffers["in_index"]
    return compact_mlp(
        x, first["weight"], last["weight"], third["weight"], first["bias"], last["bias"], third["bias"], up_scale,
        down_scale, gate_scale, index, down._buffers["out_index"], up.out_features, down.out_features, activation,
        residual, up.activations,
    )  # fmt: skip


class _NOTHING:
    """Stands for the gate of an MLP without one."""

    weight = bias = scale = None


_is_compiling = torch.compiler.is_compiling
_f32 = torch.float32


def _same_index(a: Tensor | None, b: Tensor | None) -> bool:
    # What lies on a GPU is not read: that would wait for it.
    return a is b or (a is not None and b is not None and not a.is_cuda and torch.equal(a, b))


def _compact(name: str, layer: nn.Module) -> CompactLinear:
    if isinstance(layer, CompactLinear):
        if layer.activation != "none":
            raise ValueError(f"CompactMLP: {name} must have activation none (got {layer.activation})")
        return layer
    if isinstance(layer, nn.Linear):
        return CompactLinear(layer.weight, layer.bias)
    raise TypeError(f"CompactMLP: {name} must be CompactLinear or nn.Linear (got {type(layer).__name__})")
