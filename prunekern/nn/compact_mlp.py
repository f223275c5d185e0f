"""CompactMLP: two or three compact linears and the activation between them."""

from __future__ import annotations

from torch import Tensor, nn

from prunekern.ops.compact_linear import ACTIVATIONS

from .compact_linear import CompactLinear


class CompactMLP(nn.Module):
    """y = down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate; plus the residual.

    Args:
        up, down, gate: CompactLinear without an activation of their own, or nn.Linear (its weights are shared).
        activation: none, relu, gelu (erf), gelu_tanh or silu; applied in the epilogue of up, or of gate.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self,
        up: CompactLinear | nn.Linear,
        down: CompactLinear | nn.Linear,
        gate: CompactLinear | nn.Linear | None = None,
        activation: str = "gelu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"CompactMLP: activation must be one of {', '.join(ACTIVATIONS)} (got {activation!r})")
        self.up = _compact("up", up)
        self.down = _compact("down", down)
        self.gate = None if gate is None else _compact("gate", gate)
        self.activation = activation
        for name, layer in (("up", self.up), ("gate", self.gate)):
            if layer is not None and layer.out_features != self.up.out_features:
                raise ValueError(
                    f"CompactMLP: {name} must make {self.up.out_features} channels like up (got {layer.out_features})"
                )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., in] -> [..., out_features of down]; residual of that shape or None."""
        if self.gate is None:
            hidden = self.up.run(x, None, self.activation)
        else:
            hidden = self.gate.run(x, None, self.activation) * self.up(x)
        return self.down(hidden, residual)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation}"


def _compact(name: str, layer: nn.Module) -> CompactLinear:
    if isinstance(layer, CompactLinear):
        if layer.activation != "none":
            raise ValueError(f"CompactMLP: {name} must have activation none (got {layer.activation})")
        return layer
    if isinstance(layer, nn.Linear):
        return CompactLinear(layer.weight, layer.bias)
    raise TypeError(f"CompactMLP: {name} must be CompactLinear or nn.Linear (got {type(layer).__name__})")
