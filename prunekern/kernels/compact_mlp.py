"""Triton: the gated first half of a compact MLP, act(x G^T) * (x U^T); the rest is compact_linear.

x is read once for both. Many rows go through the vendor's products and `compact_finish` instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compact_finish import compact_finish, product, takes_vendor
from .launch import cdiv, device_of, launchable, on_device, pick, precision, rows_of
from .pieces import TL_DTYPE, activate, dot_dtype, tile_of, widen


@triton.jit
def compact_gated_kernel(
    x, up, gate, up_bias, gate_bias, up_scale, gate_scale, in_index, hidden,
    M, H, K, x_stride, up_stride, gate_stride,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_SCALE: tl.constexpr, HAS_GATE_SCALE: tl.constexpr,
    GATHER: tl.constexpr, ACTIVATION: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [M, in], up and gate [H, K], hidden [M, H] contiguous."""
    block_m, block_n = tile_of(M, H, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = rows < M, columns < H
    ks = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    u_at = up + columns.to(tl.int64)[None, :] * up_stride + ks[:, None]
    g_at = gate + columns.to(tl.int64)[None, :] * gate_stride + ks[:, None]
    u_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        k_in = k + ks < K
        at = tl.load(in_index + k + ks, mask=k_in, other=0) if GATHER else k + ks
        a = tl.load(x_rows + at[None, :], mask=row_in[:, None] & k_in[None, :], other=0.0).to(DOT)
        weight_in = k_in[:, None] & column_in[None, :]
        u_acc = tl.dot(a, widen(tl.load(u_at, mask=weight_in, other=0), DOT), u_acc, input_precision=PRECISION)
        g_acc = tl.dot(a, widen(tl.load(g_at, mask=weight_in, other=0), DOT), g_acc, input_precision=PRECISION)
        u_at += BLOCK_K
        g_at += BLOCK_K
    if HAS_UP_SCALE:
        u_acc *= tl.load(up_scale + columns, mask=column_in, other=0.0)[None, :]
    if HAS_GATE_SCALE:
        g_acc *= tl.load(gate_scale + columns, mask=column_in, other=0.0)[None, :]
    if HAS_UP_BIAS:
        u_acc += tl.load(up_bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE_BIAS:
        g_acc += tl.load(gate_bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    out = activate(g_acc, ACTIVATION) * u_acc
    at = rows.to(tl.int64)[:, None] * H + columns[None, :]
    tl.store(hidden + at, out.to(hidden.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


def compact_gated(
    x: Tensor, up: Tensor, gate: Tensor, up_bias: Tensor | None, gate_bias: Tensor | None, up_scale: Tensor | None,
    gate_scale: Tensor | None, in_index: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """act(x G^T + gate_bias) * (x U^T + up_bias): [M, H] in x's dtype; x [M, in], up and gate [H, K] of one kind."""
    M, (H, K) = x.shape[0], up.shape
    hidden = torch.empty(M, H, dtype=x.dtype, device=x.device)
    if M == 0 or H == 0:
        return hidden
    if takes_vendor(x, in_index, up, gate):
        return compact_finish(product(x, gate), gate_bias, None, H, activation, None, product(x, up), up_bias)
    architecture, _ = device_of(x)
    dtype = dot_dtype(x, up, gate)
    chosen = pick("compact_gated", architecture, dtype, M)
    x, up, gate = rows_of(x), rows_of(up), rows_of(gate)
    grid = (cdiv(M, chosen["BLOCK_M"]) * cdiv(H, chosen["BLOCK_N"]),)
    optional = (x if t is None else t.contiguous() for t in (up_bias, gate_bias, up_scale, gate_scale, in_index))
    with on_device(x):
        launchable(compact_gated_kernel)[grid](
            x, up, gate, *optional, hidden, M, H, K, x.stride(0), up.stride(0), gate.stride(0),
            HAS_UP_BIAS=up_bias is not None, HAS_GATE_BIAS=gate_bias is not None, HAS_UP_SCALE=up_scale is not None,
            HAS_GATE_SCALE=gate_scale is not None, GATHER=in_index is not None, ACTIVATION=activation,
            DOT=TL_DTYPE[dtype], PRECISION=precision(dtype, architecture), **chosen,
        )  # fmt: skip
    return hidden
