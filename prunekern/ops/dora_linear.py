"""`prunekern::dora_linear`: a linear layer under masked DoRA, without forming its weight.

    z = x V^T + s (x_lora A^T) B^T          y = gain * z + bias

With a `probe` [N] the backward pass also sums (dy * y)^2 over tokens, which nothing else can tell without keeping y:
the square of what the loss loses, to first order, with a channel of one token. `pruning.saliency` asks for it.

`dora_linear` is what callers see; it is composed of `dora_linear_forward`, which also hands back z and
p = x_lora A^T for the backward pass. z is kept because the gradient of gain reads it and cannot be had from y where
gain is zero (a masked channel must still get its mask gradient).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekern import kernels

from . import by_rows, calls, checks
from .dora_linear_gradients import differentiable_gradients, gradients
from .flops import Shape, count, of_product
from .narrow import multiplies_bf16
from .registering import implement, register
from .thin import thin


def dora_linear_reference(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float,
    x_lora: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, differentiable: one weight for V, one for the low-rank branch, no factoring of the product."""
    dtype = checks.compute_dtype(x, V, A, B, gain)
    x_low = (x if x_lora is None else x_lora).to(dtype)
    low = s * (B.to(dtype) @ A.to(dtype))  # [N, K]
    z = torch.einsum("...k,nk->...n", x.to(dtype), V.to(dtype)) + torch.einsum("...k,nk->...n", x_low, low)
    y = gain.to(dtype) * z
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """What is multiplied: on the CPU fp32 in place of 16 bits, but for bf16 where that is safe and faster."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return x.dtype if x.dtype == torch.bfloat16 and multiplies_bf16() else torch.float32


def _plain(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, x_lora: Tensor | None
) -> Tensor:  # fmt: skip
    """For transforms of torch.func, which take PyTorch's own operators apart; they get no probe."""
    dtype = checks.compute_dtype(x, V)
    low = (x if x_lora is None else x_lora).to(dtype)
    with checks.without_autocast(x.device):
        z = x.to(dtype) @ V.to(dtype).T + s * ((low @ A.to(dtype).T) @ B.to(dtype).T)
    y = z * gain.to(dtype)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


_ARGS = "Tensor x, Tensor V, Tensor A, Tensor B, Tensor gain, Tensor? bias, float s"


def _compute(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, x_lora: Tensor | None,
    probe: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [..., N] in x's dtype, z [T, N] and p [T, r] in the dtype of the products."""
    dtype = _matmul_dtype(x)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(dtype)  # [T, K]; -1 is no answer where K is 0
    low = flat if x_lora is None else x_lora.reshape(flat.shape).to(dtype)
    with checks.without_autocast(x.device):
        p = thin(low, A.to(dtype)).contiguous()  # [T, r]
        z = flat @ V.to(dtype).T  # [T, N]
        z.addmm_(p, B.to(dtype).T, alpha=s)
    # One pass over the output: gain and bias together, in fp32 where the products are 16 bit.
    if x.itemsize == 2:
        y = by_rows.gained(z, gain, bias, x.dtype)
    else:
        y = (z * gain if bias is None else torch.addcmul(bias, z, gain)).to(x.dtype)
    return y.view(*x.shape[:-1], V.shape[0]), z, p


def _fake(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, x_lora: Tensor | None,
    probe: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, N, r = math.prod(x.shape[:-1]), V.shape[0], A.shape[0]
    dtype = _matmul_dtype(x)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(T, N, dtype=dtype), x.new_empty(T, r, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, V, A, B, gain, bias, s, x_lora, probe = inputs
    _, z, p = output
    needs = ctx.needs_input_grad
    # z and p are results: constants to whoever differentiates the backward pass. It computes them again from the rest.
    reads_x = needs[2] or needs[3] or needs[4] or needs[8]
    ctx.save_for_backward(
        x if reads_x and (x_lora is None or needs[4] or needs[8]) else None,
        x_lora if reads_x else None,
        V,
        A,
        B,
        gain,
        z if needs[4] or needs[8] else None,
        p if needs[3] or needs[4] or needs[8] else None,
        bias if needs[8] else None,
    )
    ctx.s, ctx.x_meta, ctx.bias_dtype = s, (x.shape, x.dtype), None if bias is None else bias.dtype
    ctx.has_x_lora, ctx.probe_dtype = x_lora is not None, None if probe is None else probe.dtype
    ctx.mark_non_differentiable(z, p)
    ctx.set_materialize_grads(False)
    ctx.add_low, ctx.products = None, p.dtype


def _backward(ctx: Any, dy: Tensor | None, _dz: None, _dp: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 9
    if dy is None:
        return tuple(grads)
    with checks.without_autocast(dy.device):
        if torch.is_grad_enabled():  # create_graph=True
            return differentiable_gradients(ctx, dy, grads)
        return gradients(ctx, dy, grads)


def _flops(x: Shape, V: Shape, A: Shape, *rest: Any, **kwargs: Any) -> int:
    return of_product(x[:-1], *V) + of_product(x[:-1], A[0], V[1] + V[0])


def _flops_backward(dy: Shape, z: Shape, p: Shape, B: Shape, *rest: Any, **kwargs: Any) -> int:
    """Work by element, but for p B^T where the probe asks for y; see kernels/dora_linear.py."""
    add_low, want_probe = rest[3], rest[7]
    return of_product(dy[:-1], *B) if add_low and want_probe else 0


_forward = register(
    # No defaults: an argument left out would be missing from what the gradient asks for.
    f"dora_linear_forward({_ARGS}, Tensor? x_lora, Tensor? probe) -> (Tensor, Tensor, Tensor)", _compute,
    flops=_flops, fake=_fake, backward=_backward, setup_context=_setup_context,
)  # fmt: skip


# --- Triton -------------------------------------------------------------------------------------------------------


@functools.cache
def triton_ops() -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., tuple[Tensor, ...]]]:
    """`prunekern::dora_linear_triton` and `prunekern::dora_linear_backward_triton`, registered when first asked for."""
    from ..kernels import dora_linear as launch

    def dora_linear_triton(
        x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float,
        x_lora: Tensor | None, probe: Tensor | None, keep_z: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        T = math.prod(x.shape[:-1])
        flat = x.reshape(T, x.shape[-1])
        low = None if x_lora is None else x_lora.reshape(flat.shape).to(x.dtype)
        V, A, B = (t.to(x.dtype) for t in (V, A, B))
        y, z, p, _ = launch.forward(flat, V, A, B, gain, bias, s, low, keep_z)
        return y.view(*x.shape[:-1], V.shape[0]), z if keep_z else z.new_empty(0), p

    def dora_linear_backward_triton(
        dy: Tensor, z: Tensor, p: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, add_low: bool,
        want_dz: bool, want_gain: bool, want_bias: bool, want_probe: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        return launch.backward(dy, z, p, B, gain, bias, s, add_low, want_dz, want_gain, want_bias, want_probe)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs[:9], output)
        ctx.add_low = launch.adds_low(inputs[0], *output[2].shape)
        ctx.fused_backward = backward_op

    def backward(ctx: Any, dy: Tensor | None, _dz: None, _dp: None) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, dy, _dz, _dp), None

    names = "prunekern::dora_linear_triton", "prunekern::dora_linear_backward_triton"
    forward = torch.library.triton_op(names[0], dora_linear_triton, mutates_args=())
    torch.library.register_autograd(names[0], backward, setup_context=setup_context)
    backward_op = torch.library.triton_op(names[1], dora_linear_backward_triton, mutates_args=())
    count("dora_linear_triton", _flops)
    count("dora_linear_backward_triton", _flops_backward)
    return forward, backward_op


kernels.register_early(triton_ops)


def _check(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, x_lora: Tensor | None,
    probe: Tensor | None,
) -> None:  # fmt: skip
    op = "dora_linear"
    checks.shape(op, "V", V, (None, None))
    (N, K), r = V.shape, A.shape[0] if A.dim() else None
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"{op}: x must have shape [..., {K}] as V is [{N}, {K}] (got {list(x.shape)})")
    checks.shape(op, "A", A, (r, K))
    checks.shape(op, "B", B, (N, r))
    checks.shape(op, "gain", gain, (N,))
    for name, tensor in (("bias", bias), ("probe", probe)):
        if tensor is not None:
            checks.shape(op, name, tensor, (N,))
    if x_lora is not None:
        checks.shape(op, "x_lora", x_lora, tuple(x.shape))
    others = {"V": V, "A": A, "B": B, "gain": gain, "bias": bias, "x_lora": x_lora, "probe": probe}
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None:
            checks.floating(op, name, tensor)
    checks.same_device(op, "x", x.device, **others)


def _dora_linear(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float,
    x_lora: Tensor | None = None, probe: Tensor | None = None,
) -> Tensor:  # fmt: skip
    _check(x, V, A, B, gain, bias, x_lora, probe)
    if kernels.usable(x, V, A, B, gain, bias, x_lora, rank=A.shape[0]):
        keep_z = torch.is_grad_enabled() and (gain.requires_grad or (probe is not None and probe.requires_grad))
        return triton_ops()[0](x, V, A, B, gain, bias, s, x_lora, probe, keep_z)[0]
    y: Tensor = _forward(x, V, A, B, gain, bias, s, x_lora, probe)[0]
    return y


def _register_autocast(device: str, key: str) -> None:
    # The products run in the autocast dtype; gain and bias stay fp32, where a gain near 1 would round to 1 in bf16.
    exclude = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(
        x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float,
        x_lora: Tensor | None = None, probe: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            x, V, A, B = (t.to(dtype) if t.dtype != torch.float64 else t for t in (x, V, A, B))
            x_lora = x_lora if x_lora is None or x_lora.dtype == torch.float64 else x_lora.to(dtype)
            y: Tensor = torch.ops.prunekern.dora_linear(x, V, A, B, gain, bias, s, x_lora, probe)
            return y

    implement("dora_linear", key, cast)


register(
    f"dora_linear({_ARGS}, Tensor? x_lora=None, Tensor? probe=None) -> Tensor",
    _dora_linear,
    flops=_flops,
    key="CompositeImplicitAutograd",
)
_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")


def dora_linear(
    x: Tensor,
    V: Tensor,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    bias: Tensor | None,
    s: float,
    x_lora: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """y = gain * (x V^T + s (x_lora A^T) B^T) + bias.

    x [..., K]; V [N, K] frozen; A [r, K]; B [N, r]; gain [N] fp32; bias [N] or None, already multiplied with the
    mask (m_b * b); x_lora [..., K]: what the low-rank branch reads where dropout makes it differ from x; probe [N]: any
    values, never read, whose "gradient" is the sum over tokens of (dy * y)^2. Returns [..., N] in x's dtype. Gradients
    to x, A, B, gain, bias, x_lora and probe, by reductions without atomics: bitwise repeatable. float64, float32,
    bfloat16, float16 (on a CPU multiplied in fp32, but for bfloat16 where that is safe and faster; gain, bias and their
    gradients are fp32 in any case). ValueError / TypeError on shapes, dtypes or devices that do not fit; RuntimeError
    when V requires a gradient.
    """
    required = {"x": x, "V": V, "A": A, "B": B, "gain": gain}
    checks.tensors("dora_linear", required, {"bias": bias, "x_lora": x_lora, "probe": probe})
    if calls.transformed():
        _check(x, V, A, B, gain, bias, x_lora, probe)
        return _plain(x, V, A, B, gain, bias, s, x_lora)
    y: Tensor = torch.ops.prunekern.dora_linear(x, V, A, B, gain, bias, s, x_lora, probe)
    return y
