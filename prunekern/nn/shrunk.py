"""Layers of a masked model whose pruned channels are gone, still in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekern.ops.activations import activate

from .indexed import pick_channels, place_channels
from .masked_dora_linear import MaskedDoRALinear


class _Shrunk(nn.Module):
    """scatter(act(layer(gather(x)))) + residual, of a layer whose weight holds the kept rows and columns only.

    `dense_shape` is the (rows, columns) the layer had, `rows` and `cols` are those that it kept: they are part of its
    state, so that a state tells what model it fits. `take_place` says where the channels belong.
    """

    is_shrunk = True
    in_index: Tensor | None
    out_index: Tensor | None
    rows: Tensor  # int64, sorted
    cols: Tensor

    def take_place(
        self, out_index: Tensor | None, out_features: int, activation: str, in_index: Tensor | None = None
    ) -> None:
        """out_index: int64, the channels of y [..., out_features] this layer makes; in_index: int64, the channels of x
        it reads; None: all.
        """
        device = self.get_parameter("weight").device
        self.register_buffer("in_index", None if in_index is None else in_index.to(device), persistent=False)
        self.register_buffer("out_index", None if out_index is None else out_index.to(device), persistent=False)
        self.scattered_to, self.activation = out_features, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.in_index is not None:
            x = pick_channels(x, self.in_index)
        y: Tensor = super().forward(x)  # of the layer it is mixed into
        y = activate(y, self.activation)
        if self.out_index is not None:
            y = place_channels(y, self.out_index, self.scattered_to)
        return y if residual is None else residual + y


class ShrunkDoRALinear(_Shrunk, MaskedDoRALinear):
    """Masked DoRA after `Pruner.shrink`: a DoRA layer of its own on the kept rows and columns, without a mask.

    ||.|| now runs over the kept columns; the magnitude was multiplied with the ratio of the two norms, so that the
    layer computes what it did. `mask` is kept for the record.
    """

    def mask_values(self) -> None:
        return None


class ShrunkLinear(_Shrunk, nn.Linear):
    """A linear layer without an adapter, shrunk with its partners."""


@torch.no_grad()
def shrink_linear(layer: Any, rows: Tensor, cols: Tensor, state: dict[Any, Any] | None = None) -> Any:
    """Drop all rows and columns of `layer` (MaskedDoRALinear or nn.Linear) but these, in place; returns the layer.

    rows, cols: sorted int64. state: `optimizer.state`, whose tensors follow their parameters. The parameters stay
    the same objects, so that optimisers keep them.
    """
    device = layer.weight.device
    rows, cols = rows.to(device), cols.to(device)
    dense_shape = tuple(layer.weight.shape)
    if not isinstance(layer, MaskedDoRALinear):
        _keep(layer.weight, ((0, rows), (1, cols)), state)
        if layer.bias is not None:
            _keep(layer.bias, ((0, rows),), state)
        layer.__class__ = ShrunkLinear
        _remember(layer, rows, cols)
        layer.out_features, layer.in_features = layer.weight.shape
        layer.dense_shape = dense_shape
        return layer
    layer.refresh()
    full = layer.inv_norm.index_select(0, rows)
    for parameter, sides in (
        (layer.weight, ((0, rows), (1, cols))),
        (layer.A, ((1, cols),)),
        (layer.B, ((0, rows),)),
        (layer.magnitude, ((0, rows),)),
        (layer.bias, ((0, rows),)),
    ):
        if parameter is not None:
            _keep(parameter, sides, state)
    layer.__class__ = ShrunkDoRALinear
    _remember(layer, rows, cols)
    layer.out_features, layer.in_features = layer.weight.shape
    layer.v_sqnorm = layer.v_sqnorm.index_select(0, rows)
    layer.inv_norm = full.clone()
    layer.forget_norm()
    layer.refresh()
    # A row of zeros has no norm before or after: its magnitude is of no effect.
    ratio = torch.where(layer.inv_norm > 0, full / layer.inv_norm, 1.0).to(layer.magnitude.dtype)
    layer.magnitude.mul_(ratio)
    if state is not None and layer.magnitude in state:
        _rescale(state[layer.magnitude], ratio)
    return layer


def _remember(layer: nn.Module, rows: Tensor, cols: Tensor) -> None:
    layer.register_buffer("rows", rows.clone())
    layer.register_buffer("cols", cols.clone())


def _keep(parameter: nn.Parameter, sides: tuple[tuple[int, Tensor], ...], state: dict[Any, Any] | None) -> None:
    """Select along dimensions, in the parameter and the optimiser's tensors of its shape, or of its factors'.

    An optimiser that keeps something else of the parameter forgets it, and begins anew with it.
    """
    shape = parameter.shape

    def select(tensor: Tensor, without: int | None = None) -> Tensor:
        """without: the dimension of the parameter that the tensor has not."""
        for dim, index in sides:
            if dim != without:
                tensor = tensor.index_select(dim if without is None else 0, index)
        return tensor

    parameter.grad = None
    kept = select(parameter.data)
    # The last loss may be alive still, and with it a gradient accumulator that expects the old shape. Another dtype in
    # between makes PyTorch forget it.
    parameter.data = kept.new_empty(0, dtype=torch.float32 if kept.dtype == torch.float64 else torch.float64)
    parameter.data = kept
    if state is not None and parameter in state:
        own, left_out = state[parameter], {"exp_avg_sq_row": 1, "exp_avg_sq_col": 0}  # Adafactor's names
        for name, value in list(own.items()):
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape == shape:
                own[name] = select(value)
            elif name in left_out and len(shape) == 2 and value.shape == (shape[1 - left_out[name]],):
                own[name] = select(value, left_out[name])
            else:
                del state[parameter]
                return


# The gradient of c m is that of m divided by c; so are what optimisers keep of it, by its power.
_POWERS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}


def _rescale(state: dict[str, Any], ratio: Tensor) -> None:
    for name, power in _POWERS.items():
        if isinstance(state.get(name), Tensor) and state[name].shape == ratio.shape:
            state[name].div_(ratio**power)
