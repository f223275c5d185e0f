"""Triton: what follows the vendor's product in a compact layer, in one pass over the output.

    y = scatter(act(z + bias)) + residual           hidden = act(g + gate_bias) * (u + up_bias)

With many rows the vendor's product is better than ours by more than this pass costs (`takes_vendor`).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, device_of, launchable, on_device, pick, precision, rows_of
from .pieces import activate, position

# Rows from which the vendor multiplies. Reasoned, not measured on a GPU: bench/gpu/layers.py times both. A Triton
# product that is fed by cp.async reaches about 3/4 of the vendor's, which makes its own 4/3 of the time; the pass reads
# z and the residual and writes y, 6 bytes an element, against 2 K operations of the product: at 4 TB/s and 700 TFLOP/s
# a fifth of the product's time for K = 3072, a tenth for 8256. Few rows are bound by the weights and by launches, where
# one kernel is best.
VENDOR_ROWS = 512


def takes_vendor(x: Tensor, in_index: Tensor | None, *weights: Tensor) -> bool:
    """Whether the vendor makes the products: one dtype all along, nothing left to gather, many rows.

    Not where fp32 is kept by three tf32 products, which are faster than what the vendor does for it.
    """
    if in_index is not None or x.shape[0] < VENDOR_ROWS or any(weight.dtype != x.dtype for weight in weights):
        return False
    return precision(x.dtype, device_of(x)[0]) != "tf32x3"


def product(x: Tensor, W: Tensor) -> Tensor:
    """x W^T [M, N] by the vendor, whose fast kernels want rows of whole 16 bytes: W is padded, the view cut."""
    short = -W.shape[0] % (16 // W.itemsize)
    return (x @ F.pad(W, (0, 0, 0, short)).T)[:, : W.shape[0]] if short else x @ W.T


@triton.jit
def compact_finish_kernel(
    z, up, bias, up_bias, out_index, residual, y,
    M, N, n_out, z_stride, residual_stride, chunk,
    HAS_BIAS: tl.constexpr, HAS_UP: tl.constexpr, HAS_UP_BIAS: tl.constexpr, SCATTER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SEARCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """z and up [M, N] of one stride, y [M, n_out] contiguous. Program (i, j): columns of block i of y, rows of chunk j.

    Written by columns of y, so that writes and the residual are whole lines; what is scattered is the reads of z, whose
    neighbours are neighbours too. SEARCH: 2^SEARCH > N.
    """
    tiles_n = tl.cdiv(n_out, BLOCK_N)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < n_out
    if SCATTER:
        place, kept = position(columns, out_index, N, SEARCH)
    else:
        place, kept = columns, column_in
    shift = tl.load(bias + place, mask=kept, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    up_shift = tl.load(up_bias + place, mask=kept, other=0.0).to(tl.float32) if HAS_UP_BIAS else 0.0
    first = (tl.program_id(0) // tiles_n) * chunk
    last = tl.minimum(first + chunk, M)
    for m in tl.range(first, last, BLOCK_M, num_stages=STAGES):
        rows = m + tl.arange(0, BLOCK_M)
        row_in = rows < last
        wide = rows.to(tl.int64)[:, None]
        read = row_in[:, None] & kept[None, :]
        at = wide * z_stride + place[None, :]
        value = tl.load(z + at, mask=read, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += shift[None, :]  # type: ignore[index]  # None where there is no bias
        value = activate(value, ACTIVATION)  # 0 stays 0: the removed columns, whose shift is 0 too
        if HAS_UP:
            factor = tl.load(up + at, mask=read, other=0.0).to(tl.float32)
            value *= factor + up_shift[None, :] if HAS_UP_BIAS else factor  # type: ignore[index]
        inside = row_in[:, None] & column_in[None, :]
        if HAS_RESIDUAL:
            value += tl.load(residual + wide * residual_stride + columns[None, :], mask=inside, other=0.0)
        tl.store(y + wide * n_out + columns[None, :], value.to(y.dtype.element_ty), mask=inside)


def compact_finish(
    z: Tensor, bias: Tensor | None, out_index: Tensor | None, n_out: int, activation: str, residual: Tensor | None,
    up: Tensor | None = None, up_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [M, n_out] in z's dtype. z, up [M, N] of one stride; bias, up_bias [N]; residual [M, n_out]."""
    M, N = z.shape
    y = torch.empty(M, n_out, dtype=z.dtype, device=z.device)
    residual = None if residual is None else rows_of(residual)
    architecture, processors = device_of(z)
    chosen = pick("compact_finish", architecture, z.dtype, M)
    tiles = cdiv(n_out, chosen["BLOCK_N"])
    # As many programs as fit at once (aot.json: 80 registers a thread), no more: each looks its columns up first.
    chunks = max(1, min(6 * processors // tiles, cdiv(M, chosen["BLOCK_M"])))
    chunk = cdiv(cdiv(M, chunks), chosen["BLOCK_M"]) * chosen["BLOCK_M"]
    absent = z  # a pointer for what is not there; never read
    with on_device(z):
        launchable(compact_finish_kernel)[(tiles * cdiv(M, chunk),)](
            z, absent if up is None else up, absent if bias is None else bias.contiguous(),
            absent if up_bias is None else up_bias.contiguous(),
            absent if out_index is None else out_index.contiguous(),
            absent if residual is None else residual, y, M, N, n_out, z.stride(0),
            0 if residual is None else residual.stride(0), chunk,
            HAS_BIAS=bias is not None, HAS_UP=up is not None, HAS_UP_BIAS=up_bias is not None,
            SCATTER=out_index is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            SEARCH=0 if out_index is None else N.bit_length(), **chosen,
        )  # fmt: skip
    return y
