"""compact_linear: a linear layer on kept channels, with gather, scatter, bias, activation and residual in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekern import _native, kernels

from . import calls, checks
from .activations import ACTIVATIONS, NUMBER, activate, activate_backward
from .compact_linear_checks import (
    OP,
    check_indices,
    check_packed_call,
    check_plain_call,
    check_shapes,
    given_inputs,
    sizes,
)
from .compact_linear_triton import GATHER_ROWS, PAD_ROWS, STEP, lined_up, run_triton, triton_op
from .flops import Shape, linear_flops
from .int4 import dequantize_weight_int4
from .narrow import multiplies_in_bf16
from .packing import (
    ELEMENT,
    KIND,
    check_plain,
    dequantize_weight,
    is_packed,
    scale_beside,
)
from .quantized import OF_X, check_activations, linear_of_rounded
from .registering import register
from .seen import still_holds

__all__ = [
    "ACTIVATIONS", "GATHER_ROWS", "NUMBER", "OP", "PAD_ROWS", "STEP", "activate", "check_indices", "compact_linear",
    "compact_linear_reference", "lined_up", "run_triton", "triton_op", "widened",
]  # fmt: skip
# The whole eager call in one C function, which gives None for a call that it leaves to the op.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call if calls.EAGER else None


def compact_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    n_out: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activations: str = "auto",
) -> Tensor:
    """y = scatter(act(gather(x) W^T + bias)) + residual.

    Schema: `prunekern::compact_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? in_index, Tensor? out_index,
    int n_out, str activation, Tensor? residual, Tensor? scale=None, str activations="auto") -> Tensor`.

    Args:
        x: [..., in], any strides. With packed panels float32 or bfloat16.
        packed: the weight W of the kept channels, in one of two forms:
            plain [N, K] (any device; differentiable unless int8 or int4): the dtype of x, bfloat16, or int8 with its
            scale; where x has 16 bits float32 too. int4 is uint8 [N, 16 ceil(K / 32)] with its scale, see
            `quantize_weight_int4`; on a GPU PyTorch widens it at every call. Computes in float64 for float64 x, else in
            float32; on a GPU products of many rows in 16 bits are rounded to them before bias, activation and residual,
            and so are those of the CPU under bf16 autocast, where it multiplies 16 bits faster, forward and backward.
            `pack_weight` of a float32, bfloat16, int8 or int4 weight: the C++ kernels, on the CPU, for inference only.
        bias: [N] in the dtype of x or float32, or None.
        in_index: [K] int64, strictly ascending: the channels of x the weight reads. None: all of them (K = in).
        out_index: [N] int64, strictly ascending: the channels of y the weight makes. None: all (N = n_out).
        n_out: channels of y. May be left out with a plain weight and no out_index.
        activation: none, relu, gelu (erf), gelu_tanh, silu or quick_gelu (z sigmoid(1.702 z)).
        residual: [..., n_out] in the dtype of x, or None; added after the activation.
        scale: [N] float32, with int8 weights: W = packed * scale, see `quantize_weight`. [N, ceil(K / 32)] float16,
            with plain int4 weights; their panels hold it. Gets no gradient.
        activations: what becomes of x before it meets a packed weight. "float": nothing, weights are widened. "int8",
            of int8 and int4 weights: its rows are rounded to 8 bits (`quantize_rows`), products summed exactly in
            int32: about 40 dB instead of 43 against the weight before it was rounded to int8 (512 inputs, normal),
            21.7 instead of 21.8 with int4, whose groups are summed so; gelu within 5.2e-5; NaN or an infinity makes
            its row NaN. "auto": the fastest with these kernels, which for bfloat16 weights may be x rounded to
            bfloat16 (53 dB instead of 56). Plain weights are multiplied as with "float".

    Returns y [..., n_out] in the dtype of x. Channels outside out_index are 0, or the residual's value.
    Raises ValueError (shapes, indices, devices, activation) or TypeError (dtypes), naming the argument.
    """
    if _EAGER and calls.short() and not calls.needs_grad(x, packed, bias, residual):
        number = NUMBER.get(activation, -1) if type(activation) is str else -1
        of_x = OF_X.get(activations, -1) if type(activations) is str else -1
        y = _EAGER(x, packed, bias, in_index, out_index, n_out, number, residual, calls.threads(), scale, of_x)
        if y is not None:
            return y
    optional = {"bias": bias, "in_index": in_index, "out_index": out_index, "residual": residual, "scale": scale}
    checks.tensors(OP, {"x": x, "packed": packed}, optional)
    checks.activation(OP, activation, ACTIVATIONS)
    if n_out is None:
        if is_packed(packed) or out_index is not None:
            raise ValueError(f"{OP}: n_out is needed with out_index or a packed weight (got None)")
        n_out = packed.shape[0]
    check_activations(OP, activations, x, {"packed": packed}, calls.needs_grad(x, packed, bias, residual))
    args = (x, packed, bias, in_index, out_index, n_out, activation, residual, scale)
    # Autograd through the reference itself, which keeps z; a GPU has a kernel behind the op.
    in_python = x.device.type == "cpu" and calls.plain_eager(x) and calls.short()
    if not is_packed(packed) and (in_python or calls.transformed()):
        check_plain_call(*args)
        products = torch.bfloat16 if multiplies_in_bf16(x, packed) else None
        return compact_linear_reference(*args, activations, products)
    made: Tensor = torch.ops.prunekern.compact_linear(*args, activations)
    return made


def compact_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_index: Tensor | None = None,
    out_index: Tensor | None = None,
    n_out: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    activations: str = "auto",
    products: torch.dtype | None = None,
) -> Tensor:
    """The same in plain PyTorch on a plain weight [N, K]; differentiable; never calls the C++ core.

    activations: "int8" rounds x, anything else does not. products: what is multiplied, x and weight rounded to it;
    None: float32, or float64 where one of them is.
    """
    dtype = checks.compute_dtype(x, weight)
    z = x.to(dtype)  # [..., in]; bf16 never meets a matmul
    if in_index is not None:
        z = z.index_select(-1, in_index)  # [..., K]
    with checks.without_autocast(x.device):
        if activations == "int8" and scale is not None:
            z = linear_of_rounded(z, weight, scale, bias).to(dtype)
        elif products is not None:
            z = F.linear(z.to(products), widened(weight, scale, products, z.shape[-1])).to(dtype)
            z = z if bias is None else z + bias.to(dtype)
        else:
            z = F.linear(z, widened(weight, scale, dtype, z.shape[-1]), None if bias is None else bias.to(dtype))
    y = activate(z, activation)  # [..., N]
    if out_index is not None:
        if n_out is None:
            raise ValueError(f"{OP}: n_out is needed with out_index (got None)")
        y = y.new_zeros(*y.shape[:-1], n_out).index_copy(-1, out_index, y)  # [..., n_out]
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype, k: int) -> Tensor:
    """A plain weight of any kind, of k inputs, in the dtype that is computed in."""
    if scale is not None and weight.dtype == torch.uint8:
        return dequantize_weight_int4(weight, scale.detach(), k, dtype)
    return weight.to(dtype) if scale is None else dequantize_weight(weight, scale.detach(), dtype)


# --- the C++ path -----------------------------------------------------------------------------------------------


def _run_packed(
    x: Tensor, packed: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None, activations: str,
) -> Tensor:  # fmt: skip
    n, k = check_packed_call(x, packed, bias, in_index, out_index, n_out, activation, residual, scale)
    y = x.new_empty((*x.shape[:-1], n_out))
    if y.numel() == 0:  # the core, which checks indices, is not asked
        check_indices(OP, in_index, x.shape[-1], out_index, n_out)
        return y
    kept_x, x_address, x_stride = calls.rows(x)  # kept: the address is worth nothing without its tensor
    kept_residual, residual_address, residual_stride = (None, 0, 0) if residual is None else calls.rows(residual)
    bias = calls.plain_memory(bias, torch.float32)
    in_index, out_index, scale = (calls.plain_memory(t) for t in (in_index, out_index, scale))
    _native.core().compact_linear(
        x=x_address, m=y.numel() // n_out, x_stride=x_stride, in_features=x.shape[-1], packed=packed.data_ptr(),
        n=n, k=k, y=y.data_ptr(), y_stride=n_out, n_out=n_out, bias=calls.address(bias),
        in_index=calls.address(in_index), out_index=calls.address(out_index), activation=activation,
        residual=residual_address, residual_stride=residual_stride, threads=calls.threads(),
        weights=KIND[packed.dtype], scale=calls.address(scale), element=ELEMENT[x.dtype],
        activations=activations,
    )  # fmt: skip
    return y


# --- registration -----------------------------------------------------------------------------------------------

_ARGS = "Tensor? bias, Tensor? in_index, Tensor? out_index, int n_out, str activation, Tensor? residual"
_SCHEMA = f'compact_linear(Tensor x, Tensor packed, {_ARGS}, Tensor? scale=None, str activations="auto") -> Tensor'
# What compiled modules call: `packed` was made of `weight` as the `Seen` of this number saw it. A graph cannot guard on
# that, so it is asked when it runs: a weight changed since then is read itself.
_CACHED_SCHEMA = (
    f"_compact_linear_cached(Tensor x, Tensor weight, Tensor packed, int seen, {_ARGS}, Tensor? scale, "
    "str activations) -> Tensor"
)


def _forward(
    x: Tensor, packed: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None = None, activations: str = "auto",
) -> Tensor:  # fmt: skip
    check_activations(OP, activations, x, {"packed": packed}, False)
    args = (x, packed, bias, in_index, out_index, n_out, activation, residual, scale)
    if is_packed(packed):
        return _run_packed(*args, activations)
    check_plain_call(*args)
    if packed.dtype != torch.uint8 and kernels.usable(x, packed, bias, residual):
        return run_triton(*args)
    products = torch.bfloat16 if multiplies_in_bf16(x, packed) else None
    return compact_linear_reference(*args, activations, products).contiguous()


def _forward_cached(x: Tensor, weight: Tensor, packed: Tensor, seen: int, *rest: Any) -> Tensor:
    used = packed if still_holds(seen, weight) else weight
    args: list[Any] = [*rest]
    args[6] = scale_beside(used, args[6])
    return _forward(x, used, *args)


def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None = None, activations: str = "auto",
) -> Tensor:  # fmt: skip
    check_activations(OP, activations, x, {"packed": packed}, False)
    if is_packed(packed):
        n, k = sizes(x, packed, in_index, out_index, n_out)
    else:
        n, k = check_plain(OP, "packed", packed, given_inputs(x, in_index))
    check_shapes(x, packed, n, k, bias, in_index, out_index, n_out, activation, residual, scale)
    return x.new_empty((*x.shape[:-1], n_out))


def _fake_cached(x: Tensor, weight: Tensor, packed: Tensor, seen: int, *rest: Any) -> Tensor:
    return _fake(x, weight, *rest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, in_index, out_index, _, ctx.activation, residual, scale, _ = inputs
    ctx.is_packed = is_packed(packed)
    ctx.in_bf16 = not ctx.is_packed and multiplies_in_bf16(x, packed)
    ctx.with_bias, ctx.with_residual = bias is not None, residual is not None
    if not ctx.is_packed:
        ctx.save_for_backward(x, packed, bias, in_index, out_index, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad: [..., n_out]. The activation's input is computed again instead of kept."""
    if ctx.is_packed:
        raise RuntimeError(
            f"{OP}: a packed weight is for inference and has no gradient; pass the plain weight [N, K] to train"
        )
    x, weight, bias, in_index, out_index, scale = ctx.saved_tensors
    narrow = x.is_cuda and x.dtype == weight.dtype  # 16-bit products cost a GPU no accuracy: it sums in fp32
    dtype = x.dtype if narrow else checks.compute_dtype(x, weight)
    products = torch.bfloat16 if ctx.in_bf16 else dtype
    read = x.to(products) if in_index is None else x.to(products).index_select(-1, in_index)  # [..., K]
    wide = widened(weight, scale, products, read.shape[-1])
    d = grad.to(dtype)
    if out_index is not None:
        d = d.index_select(-1, out_index)  # [..., N]
    with checks.without_autocast(x.device):  # of a backward pass that is called inside it, too
        if ctx.activation != "none":
            z = F.linear(read, wide).to(dtype)
            d = activate_backward(d, z if bias is None else z + bias.to(dtype), ctx.activation)
        summed, d = (
            d.reshape(-1, d.shape[-1]),
            d.to(products),
        )  # the bias has no product: its sum is of what is not rounded
        rows = d.reshape(-1, d.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = d @ wide
            if in_index is not None:
                grad_x = torch.zeros_like(x, dtype=products).index_copy(-1, in_index, grad_x)
            grad_x = grad_x.to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ read.reshape(-1, read.shape[-1])).to(weight.dtype)
        if ctx.with_bias and ctx.needs_input_grad[2]:
            grad_bias = summed.sum(0, dtype=checks.compute_dtype(summed)).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None, grad if ctx.with_residual else None, None, None


def _flops_cached(x: Shape, weight: Shape, packed: Shape, seen: int, *rest: Any, **kwargs: Any) -> int:
    return linear_flops(x, packed, *rest, **kwargs)


register(_SCHEMA, _forward, flops=linear_flops, fake=_fake, backward=_backward, setup_context=_setup_context)
register(_CACHED_SCHEMA, _forward_cached, flops=_flops_cached, fake=_fake_cached)
