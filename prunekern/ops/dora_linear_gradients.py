"""Gradients of `dora_linear`: from what the forward pass kept or, to be differentiated again, from its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import by_rows, checks
from .thin import thin, thin_sums


def gradients(ctx: Any, dy: Tensor, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """By argument of the forward op, in `grads`. dy: [..., N]. Where the forward pass was Triton's, ctx.add_low is no
    None, and ctx.fused_backward is the op.
    """
    x, x_lora, V, A, B, gain, z, p, bias = ctx.saved_tensors
    needs, s, (x_shape, x_dtype) = ctx.needs_input_grad, ctx.s, ctx.x_meta
    dtype = ctx.products if ctx.add_low is None else dy.dtype
    T = math.prod(dy.shape[:-1])
    dy = dy.reshape(T, dy.shape[-1])  # [T, N]
    low_needs_x = needs[7] if ctx.has_x_lora else needs[0]
    want_dz = needs[0] or needs[2] or low_needs_x or (needs[3] and ctx.add_low is None)
    if ctx.add_low is not None:
        z, low = (dy if t is None else t for t in (z, p))  # not read where d_gain is not wanted
        sums = ctx.fused_backward(
            dy, z, low, B.to(dtype), gain, bias, s, ctx.add_low, want_dz, needs[4], needs[5], needs[8]
        )
        dz, d_gain, d_bias, d_probe = sums
        of_low = _sums(dy, p) if needs[3] or (needs[4] and ctx.add_low) else None  # [N, r]
        if needs[8]:
            grads[8] = d_probe.to(ctx.probe_dtype)
        if needs[4]:
            if ctx.add_low:  # what z lacks: sum over t of dy (p B^T), without forming p B^T
                d_gain = d_gain.add_((of_low * B.to(dtype)).sum(1), alpha=s)
            grads[4] = d_gain.to(gain.dtype)
        if needs[3]:
            grads[3] = (of_low * (s * gain)[:, None]).to(B.dtype)
        if needs[5]:
            grads[5] = d_bias.to(ctx.bias_dtype)
    elif dy.itemsize == 2:
        dz, d_gain, d_bias, d_probe = by_rows.backward(dy, z, gain, bias, dtype, want_dz, needs[4], needs[5], needs[8])
        if needs[4]:
            grads[4] = d_gain.to(gain.dtype)
        if needs[5]:
            grads[5] = d_bias.to(ctx.bias_dtype)
        if needs[8]:
            grads[8] = d_probe.to(ctx.probe_dtype)
    else:
        if needs[4]:
            grads[4] = (dy.to(gain.dtype) * z).sum(0).to(gain.dtype)
        if needs[5]:
            grads[5] = dy.sum(0, dtype=ctx.bias_dtype)
        if needs[8]:
            y = z * gain if bias is None else torch.addcmul(bias, z, gain)
            grads[8] = y.mul_(dy).square_().sum(0).to(ctx.probe_dtype)
        if want_dz:
            dz = (dy * gain).to(dtype)  # [T, N]
    if want_dz:
        if needs[3] and grads[3] is None:
            grads[3] = thin_sums(dz, p).mul_(s).to(B.dtype)
        if needs[2] or low_needs_x:
            dp = thin(dz, B.to(dtype).T).mul_(s)  # [T, r]
        if needs[2]:
            read = x_lora if ctx.has_x_lora else x
            grads[2] = (dp.T @ read.reshape(T, A.shape[1]).to(dtype)).to(A.dtype)
        if needs[0]:
            # The narrow product first: the wide one then adds to it as it writes, one pass over dx less.
            if ctx.has_x_lora:
                dx = dz @ V.to(dtype)  # [T, K]
            else:
                dx = dp @ A.to(dtype)
                torch.addmm(dx, dz, V.to(dtype), out=dx)  # addmm_, by a name that FLOP counters know
            grads[0] = dx.to(x_dtype).view(x_shape)
        if ctx.has_x_lora and needs[7]:
            grads[7] = (dp @ A.to(dtype)).to(x_dtype).view(x_shape)
    _refuse_gradient_of_V(needs)
    return tuple(grads)


def _refuse_gradient_of_V(needs: Sequence[bool]) -> None:
    if needs[1]:
        raise RuntimeError("dora_linear: V must be frozen (got V.requires_grad=True); no gradient is formed for it")


def differentiable_gradients(ctx: Any, dy: Tensor, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same from inputs alone, so that second derivatives are those of the definition. What the probe asks for is no
    derivative, and stays a constant.
    """
    x, x_lora, V, A, B, gain, _, _, bias = ctx.saved_tensors
    needs, s, (x_shape, x_dtype) = ctx.needs_input_grad, ctx.s, ctx.x_meta
    _refuse_gradient_of_V(needs)
    T, dtype, out = math.prod(x_shape[:-1]), checks.compute_dtype(dy, V), dy.dtype

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(T, tensor.shape[-1]).to(dtype)

    dy, V, wide_A, wide_B = rows(dy), V.to(dtype), A.to(dtype), B.to(dtype)
    dz = dy * gain.to(dtype)  # [T, N]
    dp = s * (dz @ wide_B)  # [T, r]
    low = x_lora if ctx.has_x_lora else x
    p = None if low is None else rows(low) @ wide_A.T  # [T, r]
    if needs[0]:
        dx = dz @ V if ctx.has_x_lora else dz @ V + dp @ wide_A
        grads[0] = dx.to(x_dtype).view(x_shape)
    if needs[2]:
        grads[2] = (dp.T @ rows(low)).to(A.dtype)
    if needs[3]:
        grads[3] = (s * (dz.T @ p)).to(B.dtype)
    if needs[4] or needs[8]:
        z = rows(x) @ V.T + s * (p @ wide_B.T)  # [T, N]
        if needs[4]:
            grads[4] = (dy * z).sum(0).to(gain.dtype)
        if needs[8]:
            y = z * gain if bias is None else torch.addcmul(bias.to(dtype), z, gain.to(dtype))
            grads[8] = (y.detach() * dy.detach()).square().sum(0).to(ctx.probe_dtype)
    if needs[5]:
        grads[5] = dy.sum(0).to(ctx.bias_dtype)
    if ctx.has_x_lora and needs[7]:
        grads[7] = (dp @ wide_A).to(out).view(x_shape)
    return tuple(grads)


def _sums(dy: Tensor, p: Tensor) -> Tensor:
    """dy^T p [N, r], not rounded to 16 bits: a masked channel's sums may be beyond fp16, and gain has not met them."""
    if dy.itemsize != 2:
        return dy.T @ p
    if dy.is_cuda and not torch.version.hip:
        return torch.mm(dy.T, p, out_dtype=torch.float32)
    return dy.T.float() @ p.float()
