"""Triton: W' = gain * (V + s B A) on kept rows and columns, in one pass; nothing else is read or written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import by_rank, cdiv, device_of, launchable, on_device, precision, rows_of


@triton.jit
def dora_merge_kernel(
    V, A, B, gain, rows, cols, W,
    n_rows, n_cols, r, s, v_stride, a_stride, b_stride,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, BLOCK_R: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [n_rows, n_cols] contiguous. rows, cols: int64 kept indices into V [N, K]."""
    tiles_k = tl.cdiv(n_cols, BLOCK_K)
    out_rows = (tl.program_id(0) // tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_cols = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_in, col_in = out_rows < n_rows, out_cols < n_cols
    n = tl.load(rows + out_rows, mask=row_in, other=0) if HAS_ROWS else out_rows.to(tl.int64)
    k = tl.load(cols + out_cols, mask=col_in, other=0) if HAS_COLS else out_cols
    inside = row_in[:, None] & col_in[None, :]
    v = tl.load(V + n[:, None] * v_stride + k[None, :], mask=inside, other=0.0)
    low = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ranks = tl.arange(0, BLOCK_R)
    b_at = B + n[:, None] * b_stride + ranks[None, :]
    a_at = A + ranks.to(tl.int64)[:, None] * a_stride + k[None, :]
    if ONE_BLOCK:
        b = tl.load(b_at, mask=row_in[:, None] & (ranks < r)[None, :], other=0.0)
        a = tl.load(a_at, mask=(ranks < r)[:, None] & col_in[None, :], other=0.0)
        low = tl.dot(b, a, low, input_precision=PRECISION)
    else:
        for start in range(0, r, BLOCK_R):
            rank_in = start + ranks < r
            b = tl.load(b_at + start, mask=row_in[:, None] & rank_in[None, :], other=0.0)
            a = tl.load(a_at, mask=rank_in[:, None] & col_in[None, :], other=0.0)
            low = tl.dot(b, a, low, input_precision=PRECISION)
            a_at += BLOCK_R * a_stride
    factor = tl.load(gain + n, mask=row_in, other=0.0)
    w = factor[:, None] * (v.to(tl.float32) + s * low)
    at = out_rows.to(tl.int64)[:, None] * n_cols + out_cols[None, :]
    tl.store(W + at, w.to(W.dtype.element_ty), mask=inside)


def dora_merge(
    V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float
) -> Tensor:
    """W' [kept rows, kept cols] in V's dtype. A and B are multiplied in fp32: a merge is done once, and kept."""
    N = V.shape[0] if rows is None else rows.shape[0]
    K = V.shape[1] if cols is None else cols.shape[0]
    W = torch.empty(N, K, dtype=V.dtype, device=V.device)
    if N == 0 or K == 0:
        return W
    architecture, _ = device_of(V)
    V, A, B = rows_of(V), rows_of(A).float(), rows_of(B).float()
    chosen = by_rank("dora_merge", architecture, A.dtype, A.shape[0])
    grid = (cdiv(N, chosen["BLOCK_N"]) * cdiv(K, chosen["BLOCK_K"]),)
    with on_device(V):
        launchable(dora_merge_kernel)[grid](
            V, A, B, gain.float().contiguous(), V if rows is None else rows.contiguous(),
            V if cols is None else cols.contiguous(), W, N, K, A.shape[0], s, V.stride(0), A.stride(0), B.stride(0),
            HAS_ROWS=rows is not None, HAS_COLS=cols is not None, **chosen,
            PRECISION=precision(A.dtype, architecture, exact=True),
        )  # fmt: skip
    return W
