"""compact_mlp: two or three compact linears and the activation between them, without writing out the rows between."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from prunekern import _native, kernels

from . import calls, checks
from .compact_linear import ACTIVATIONS, NUMBER, check_indices, compact_linear, compact_linear_reference, lined_up
from .compact_mlp_checks import OP, by_layer, check_shapes
from .flops import Shape, count, of_product
from .packing import ELEMENT, KIND, check_panels, is_packed, scale_beside
from .quantized import OF_X, check_activations
from .registering import register
from .seen import still_holds

T = TypeVar("T")  # a tensor, or its shape
# The whole eager call in one C function, which gives None for a call that it leaves to the op.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call_mlp if calls.EAGER else None


def compact_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    n_hidden: int | None = None,
    n_out: int | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    activations: str = "auto",
) -> Tensor:
    """y = scatter(down(act(up(gather(x))))) + residual, or with a gate scatter(down(act(gate(x)) * up(x))) + residual.

    Schema: `prunekern::compact_mlp(Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor? up_bias, Tensor? down_bias,
    Tensor? gate_bias, Tensor? up_scale, Tensor? down_scale, Tensor? gate_scale, Tensor? in_index, Tensor? out_index,
    int n_hidden, int n_out, str activation, Tensor? residual, str activations="auto") -> Tensor`.

    Args:
        x: [..., in], any strides; float32 or bfloat16 with packed weights. The rows between the layers have its dtype.
        up, gate: the weights of the kept channels [H, K], gate may be None; down: [N, H]. All plain, or all panels
            of `pack_weight`: see `compact_linear`, which says what dtypes go together and how near float64 they come.
            Plain ones are differentiable; packed ones run the C++ kernel, block by block of rows, the rows between
            the layers in the L2 cache. int4: see `compact_linear` too.
        up_bias, gate_bias: [H], down_bias: [N], in the dtype of x or float32, or None.
        up_scale, gate_scale: [H], down_scale: [N], float32, with int8 weights; of plain int4 weights theirs.
        in_index: [K] int64, strictly ascending: the channels of x that up and gate read. None: all.
        out_index: [N] int64, strictly ascending: the channels of y that down makes. None: all (N = n_out).
        n_hidden: H; n_out: channels of y. May be left out with plain weights (n_out: and no out_index).
        activation: none, relu, gelu (erf), gelu_tanh, silu or quick_gelu (z sigmoid(1.702 z)).
        residual: [..., n_out] in the dtype of x, or None.
        activations: what becomes of x and of the rows between the layers, as in `compact_linear`.

    Returns y [..., n_out] in the dtype of x. Channels outside out_index are 0, or the residual's value.
    Raises ValueError or TypeError naming the argument.
    """
    if _EAGER and calls.short() and not calls.needs_grad(x, up, down, gate, up_bias, down_bias, gate_bias, residual):
        y = _EAGER(
            x, up, down, gate, up_bias, down_bias, gate_bias, up_scale, down_scale, gate_scale, in_index, out_index,
            n_hidden, n_out, NUMBER.get(activation, -1) if type(activation) is str else -1, residual, calls.threads(),
            OF_X.get(activations, -1) if type(activations) is str else -1,
        )  # fmt: skip
        if y is not None:
            return y
    optional = {"gate": gate, "in_index": in_index, "out_index": out_index, "residual": residual}
    optional |= by_layer(up_bias, down_bias, gate_bias, "_bias") | by_layer(up_scale, down_scale, gate_scale, "_scale")
    checks.tensors(OP, {"x": x, "up": up, "down": down}, optional)
    checks.activation(OP, activation, ACTIVATIONS)
    packed = is_packed(up)
    if n_hidden is None or n_out is None:
        if packed or (n_out is None and out_index is not None):
            raise ValueError(
                f"{OP}: n_hidden and n_out are needed with packed weights, n_out with out_index (got None)"
            )
        n_hidden, n_out = up.shape[0], down.shape[0] if n_out is None else n_out
    args = (x, up, down, gate, up_bias, down_bias, gate_bias, up_scale, down_scale, gate_scale, in_index, out_index,
            n_hidden, n_out, activation, residual, activations)  # fmt: skip
    weights = {name: w for name, w in by_layer(up, down, gate).items() if w is not None}
    check_activations(OP, activations, x, weights, calls.needs_grad(x, *weights.values(), residual))
    if not packed and not is_packed(down):
        tensors = (x, up, down, gate, up_bias, down_bias, gate_bias, residual)
        if x.device.type == "cuda" and not calls.needs_grad(*tensors):
            made: Tensor = torch.ops.prunekern.compact_mlp(*args)
            return made
        check_shapes(*args)
        return _composed(compact_linear, *args)  # differentiable and traceable, layer by layer
    made = torch.ops.prunekern.compact_mlp(*args)
    return made


def compact_mlp_reference(*args: Any, **kwargs: Any) -> Tensor:
    """The same in plain PyTorch on plain weights, arguments as in the schema; never calls the C++ core."""
    return _composed(compact_linear_reference, *args, **kwargs)


def _composed(
    linear: Callable[..., Tensor],
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    gate_bias: Tensor | None, up_scale: Tensor | None, down_scale: Tensor | None, gate_scale: Tensor | None,
    in_index: Tensor | None, out_index: Tensor | None, n_hidden: int, n_out: int, activation: str,
    residual: Tensor | None, activations: str = "auto",
) -> Tensor:  # fmt: skip
    """One `linear` a layer."""
    if gate is None:
        hidden = linear(x, up, up_bias, in_index, None, n_hidden, activation, None, up_scale, activations)  # [..., H]
    else:
        hidden = linear(x, gate, gate_bias, in_index, None, n_hidden, activation, None, gate_scale, activations)
        hidden = hidden * linear(x, up, up_bias, in_index, None, n_hidden, "none", None, up_scale, activations)
    return linear(hidden, down, down_bias, None, out_index, n_out, "none", residual, down_scale, activations)


# --- the C++ path -----------------------------------------------------------------------------------------------


def _run_packed(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    gate_bias: Tensor | None, up_scale: Tensor | None, down_scale: Tensor | None, gate_scale: Tensor | None,
    in_index: Tensor | None, out_index: Tensor | None, n_hidden: int, n_out: int, activation: str,
    residual: Tensor | None, activations: str = "auto",
) -> Tensor:  # fmt: skip
    if x.dtype not in ELEMENT:
        raise TypeError(f"{OP}: x must be float32 or bfloat16 with packed weights (got {x.dtype})")
    y = x.new_empty((*x.shape[:-1], n_out))
    if y.numel() == 0:  # the core, which checks indices, is not asked
        check_indices(OP, in_index, x.shape[-1], out_index, n_out)
        return y
    kept_x, x_address, x_stride = calls.rows(x)  # kept: the address is worth nothing without its tensor
    kept_residual, residual_address, residual_stride = (None, 0, 0) if residual is None else calls.rows(residual)
    biases = [calls.plain_memory(b, torch.float32) for b in (up_bias, down_bias, gate_bias)]
    scales = [calls.plain_memory(s) for s in (up_scale, down_scale, gate_scale)]
    in_index, out_index = calls.plain_memory(in_index), calls.plain_memory(out_index)
    k = x.shape[-1] if in_index is None else in_index.numel()
    n = n_out if out_index is None else out_index.numel()
    for name, weight, shape in (
        ("up", up, (n_hidden, k)),
        ("down", down, (n, n_hidden)),
        ("gate", gate, (n_hidden, k)),
    ):
        if weight is not None:
            check_panels(OP, name, weight, *shape)
    kinds = [None if w is None else KIND[w.dtype] for w in (up, down, gate)]
    # (kind, weight, bias, scale) of each layer, by address.
    first, last, third = (
        None if w is None else (kind, w.data_ptr(), calls.address(bias), calls.address(scale))
        for w, kind, bias, scale in zip((up, down, gate), kinds, biases, scales, strict=True)
    )
    _native.core().compact_mlp(
        x=x_address, m=y.numel() // n_out, x_stride=x_stride, in_features=x.shape[-1],
        k=k, up=first, n_hidden=n_hidden, down=last, n=n, y=y.data_ptr(), y_stride=n_out, n_out=n_out, gate=third,
        in_index=calls.address(in_index), out_index=calls.address(out_index), activation=activation,
        residual=residual_address, residual_stride=residual_stride, threads=calls.threads(),
        element=ELEMENT[x.dtype], activations=activations,
    )  # fmt: skip
    return y


# --- Triton -----------------------------------------------------------------------------------------------------


@functools.cache
def triton_op() -> Callable[..., Tensor]:
    """`prunekern::compact_gated_triton`, registered when first asked for."""
    from ..kernels.compact_mlp import compact_gated as launch

    def compact_gated_triton(
        x: Tensor, up: Tensor, gate: Tensor, up_bias: Tensor | None, gate_bias: Tensor | None,
        up_scale: Tensor | None, gate_scale: Tensor | None, in_index: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        return launch(x, up, gate, up_bias, gate_bias, up_scale, gate_scale, in_index, activation)

    op = torch.library.triton_op("prunekern::compact_gated_triton", compact_gated_triton, mutates_args=())
    count("compact_gated_triton", _flops_gated)
    return op


kernels.register_early(triton_op)


def _run_triton(
    x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, up_bias: Tensor | None, down_bias: Tensor | None,
    gate_bias: Tensor | None, up_scale: Tensor | None, down_scale: Tensor | None, gate_scale: Tensor | None,
    in_index: Tensor | None, out_index: Tensor | None, n_hidden: int, n_out: int, activation: str,
    residual: Tensor | None, activations: str = "auto",
) -> Tensor:  # fmt: skip
    """Gate and up in one launch, then down, for few rows; what many rows take, `kernels.compact_finish` says."""
    if gate is None or up.dtype != gate.dtype:
        return _composed(compact_linear, x, up, down, gate, up_bias, down_bias, gate_bias, up_scale, down_scale,
                         gate_scale, in_index, out_index, n_hidden, n_out, activation, residual)  # fmt: skip
    if in_index is not None:
        checks.kept_index_anywhere(OP, "in_index", in_index, x.shape[-1])
    x, in_index, (up, gate) = lined_up(x, in_index, up, gate)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    with checks.without_autocast(x.device):
        hidden = triton_op()(rows, up, gate, up_bias, gate_bias, up_scale, gate_scale, in_index, activation)
    hidden = hidden.view(*x.shape[:-1], n_hidden)
    return compact_linear(hidden, down, down_bias, None, out_index, n_out, "none", residual, down_scale)


# --- registration -----------------------------------------------------------------------------------------------

_REST = (
    "Tensor? up_bias, Tensor? down_bias, Tensor? gate_bias, Tensor? up_scale, Tensor? down_scale, "
    "Tensor? gate_scale, Tensor? in_index, Tensor? out_index, int n_hidden, int n_out, str activation, "
    'Tensor? residual, str activations="auto") -> Tensor'
)
_SCHEMA = f"compact_mlp(Tensor x, Tensor up, Tensor down, Tensor? gate, {_REST}"
# What compiled modules call, as in compact_linear.py: packed weights, and the plain ones they were made of. The lists
# have one entry a layer.
_CACHED_SCHEMA = "_compact_mlp_cached(Tensor x, Tensor[] weights, Tensor[] packed, int[] seen, " + _REST


def _forward(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, *rest: Any) -> Tensor:
    check_shapes(x, up, down, gate, *rest)
    if is_packed(up):
        return _run_packed(x, up, down, gate, *rest)
    if not any(w is not None and w.dtype == torch.uint8 for w in (up, down, gate)) and kernels.usable(
        x, up, down, gate, *rest[:3]
    ):
        return _run_triton(x, up, down, gate, *rest)
    return compact_mlp_reference(x, up, down, gate, *rest).contiguous()


def _forward_cached(
    x: Tensor, weights: list[Tensor], packed: list[Tensor], seen: list[int], *rest: Any
) -> Tensor:  # fmt: skip
    used = _three(packed if all(map(still_holds, seen, weights)) else weights)
    scales = [w if w is None else scale_beside(w, scale) for w, scale in zip(used, rest[3:6], strict=True)]
    return _forward(x, *used, *rest[:3], *scales, *rest[6:])


def _fake(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, *rest: Any) -> Tensor:
    check_shapes(x, up, down, gate, *rest)
    n_out: int = rest[9]
    return x.new_empty((*x.shape[:-1], n_out))


def _fake_cached(x: Tensor, weights: list[Tensor], packed: list[Tensor], seen: list[int], *rest: Any) -> Tensor:
    return _fake(x, *_three(weights), *rest)


def _three(weights: list[T]) -> tuple[T, T, T | None]:
    return weights[0], weights[1], weights[2] if len(weights) > 2 else None


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(f"{OP}: this op is for inference; prunekern.ops.compact_mlp on plain weights has a gradient")


def _flops(x: Shape, up: Shape, down: Shape, gate: Shape | None, *rest: Any, **kwargs: Any) -> int:
    in_index, out_index, n_hidden, n_out = rest[6:10]
    n, k = n_out if out_index is None else out_index[0], x[-1] if in_index is None else in_index[0]
    return of_product(x[:-1], n_hidden, k) * (1 if gate is None else 2) + of_product(x[:-1], n, n_hidden)


def _flops_cached(
    x: Shape, weights: list[Shape], packed: list[Shape], seen: list[int], *rest: Any, **kwargs: Any
) -> int:  # fmt: skip
    return _flops(x, *_three(weights), *rest, **kwargs)


def _flops_gated(
    x: Shape, up: Shape, gate: Shape, up_bias: Shape | None, gate_bias: Shape | None, up_scale: Shape | None,
    gate_scale: Shape | None, in_index: Shape | None, *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return 2 * of_product(x[:-1], *up)


register(_SCHEMA, _forward, flops=_flops, fake=_fake, backward=_backward)
register(_CACHED_SCHEMA, _forward_cached, flops=_flops_cached, fake=_fake_cached)
