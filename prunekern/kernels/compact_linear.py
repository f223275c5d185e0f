"""Triton: a linear layer on kept channels. Gathered loads along K; bias, activation, residual and scatter in registers.

    y = scatter(act(gather(x) W^T + bias)) + residual

Every column of y is written once: kept ones by the product's programs, removed ones by programs of the same launch that
look each column up in out_index. Many rows go through the vendor's product and `compact_finish` instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compact_finish import compact_finish, product, takes_vendor
from .launch import cdiv, device_of, launchable, on_device, pick, precision, rows_of
from .pieces import TL_DTYPE, activate, dot_dtype, position, tile_of, widen


@triton.jit
def compact_linear_kernel(
    x, W, bias, scale, in_index, out_index, residual, y,
    M, N, K, n_out, x_stride, w_stride, residual_stride,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SEARCH: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x [M, in], W [N, K], y [M, n_out] contiguous. DOT: the dtype of the products. SEARCH: 2^SEARCH > N."""
    if SCATTER:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        if tl.program_id(0) >= tiles:
            _fill(tl.program_id(0) - tiles, out_index, residual, y, M, N, n_out, residual_stride,
                  HAS_RESIDUAL, SEARCH, BLOCK_M, BLOCK_N)  # fmt: skip
            return
    block_m, block_n = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = rows < M, columns < N
    ks = tl.arange(0, BLOCK_K)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    w_at = W + columns.to(tl.int64)[None, :] * w_stride + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        k_in = k + ks < K
        at = tl.load(in_index + k + ks, mask=k_in, other=0) if GATHER else k + ks
        a = tl.load(x_rows + at[None, :], mask=row_in[:, None] & k_in[None, :], other=0.0)
        b = tl.load(w_at, mask=k_in[:, None] & column_in[None, :], other=0)
        acc = tl.dot(a.to(DOT), widen(b, DOT), acc, input_precision=PRECISION)
        w_at += BLOCK_K
    # One 64-bit base a program and 32-bit offsets: 64-bit addresses of a whole tile would not fit the registers.
    first = (block_m * BLOCK_M).to(tl.int64)
    y += first * n_out
    residual += first * residual_stride
    if SCATTER and BLOCK_N > 64:
        # Halves of the columns one after the other, for the same reason: addresses of scattered columns are many.
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        half = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _write(left, half, bias, scale, out_index, residual, y, row_in, N, n_out, residual_stride,
               HAS_BIAS, HAS_SCALE, SCATTER, HAS_RESIDUAL, ACTIVATION, BLOCK_M)  # fmt: skip
        _write(right, half + BLOCK_N // 2, bias, scale, out_index, residual, y, row_in, N, n_out, residual_stride,
               HAS_BIAS, HAS_SCALE, SCATTER, HAS_RESIDUAL, ACTIVATION, BLOCK_M)  # fmt: skip
    else:
        _write(acc, columns, bias, scale, out_index, residual, y, row_in, N, n_out, residual_stride,
               HAS_BIAS, HAS_SCALE, SCATTER, HAS_RESIDUAL, ACTIVATION, BLOCK_M)  # fmt: skip


@triton.jit
def _write(acc, columns, bias, scale, out_index, residual, y, row_in, N, n_out, residual_stride,
           HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, SCATTER: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
           ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """What follows the product, for some columns of the tile. y and residual point at its first row."""
    column_in = columns < N
    local = tl.arange(0, BLOCK_M)
    inside = row_in[:, None] & column_in[None, :]
    if HAS_SCALE:
        acc *= tl.load(scale + columns, mask=column_in, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    place = columns
    if SCATTER:
        place = tl.load(out_index + columns, mask=column_in, other=0).to(tl.int32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + (local[:, None] * residual_stride + place[None, :]), mask=inside, other=0.0)
    tl.store(y + (local[:, None] * n_out + place[None, :]), acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _fill(tile, out_index, residual, y, M, N, n_out, residual_stride, HAS_RESIDUAL: tl.constexpr,
          SEARCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """A tile of y [M, n_out]: its removed columns get the residual's values, or zero."""
    tiles_n = tl.cdiv(n_out, BLOCK_N)
    rows = (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, kept = position(columns, out_index, N, SEARCH)
    removed = (kept == 0) & (columns < n_out)
    inside = (rows < M)[:, None] & removed[None, :]
    wide = rows.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        value = tl.load(residual + wide * residual_stride + columns[None, :], mask=inside, other=0.0)
    else:
        value = tl.zeros((BLOCK_M, BLOCK_N), y.dtype.element_ty)
    tl.store(y + wide * n_out + columns[None, :], value, mask=inside)


def compact_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, in_index: Tensor | None, out_index: Tensor | None, n_out: int,
    activation: str, residual: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [M, n_out] in x's dtype; x [M, in], W [N, K] of any kind, residual [M, n_out]; see `prunekern.ops`."""
    M, (N, K) = x.shape[0], W.shape
    y = torch.empty(M, n_out, dtype=x.dtype, device=x.device)
    if M == 0 or n_out == 0:
        return y
    if N == 0:
        return y.zero_() if residual is None else y.copy_(residual)
    if takes_vendor(x, in_index, W):
        return compact_finish(product(x, W), bias, out_index, n_out, activation, residual)
    architecture, _ = device_of(x)
    dtype = dot_dtype(x, W)
    chosen = pick("compact_linear", architecture, dtype, M)
    x, W = rows_of(x), rows_of(W)
    residual = None if residual is None else rows_of(residual)
    tiles = cdiv(M, chosen["BLOCK_M"]) * cdiv(N, chosen["BLOCK_N"])
    if out_index is not None and n_out > N:
        tiles += cdiv(M, chosen["BLOCK_M"]) * cdiv(n_out, chosen["BLOCK_N"])
    absent = x  # a pointer for what is not there; never read
    with on_device(x):
        launchable(compact_linear_kernel)[(tiles,)](
            x, W, absent if bias is None else bias.contiguous(), absent if scale is None else scale.contiguous(),
            absent if in_index is None else in_index.contiguous(),
            absent if out_index is None else out_index.contiguous(), absent if residual is None else residual, y,
            M, N, K, n_out, x.stride(0), W.stride(0), 0 if residual is None else residual.stride(0),
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, GATHER=in_index is not None,
            SCATTER=out_index is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            SEARCH=0 if out_index is None else N.bit_length(), DOT=TL_DTYPE[dtype],
            PRECISION=precision(dtype, architecture), **chosen,
        )  # fmt: skip
    return y
