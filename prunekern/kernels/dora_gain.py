"""Triton: inverse row norm of V + s B A and gain, in one pass over V.

16 bits and rank up to 64: |V|^2 + 2 s <V, BA> + s^2 |BA|^2 with U = V A^T and G = A A^T in registers, |V|^2 given. A
tile of V goes from memory through shared memory into the matrix unit and is never touched by a thread: what is left is
the stream of V. fp32 and larger ranks: a tile of s B A is made by `tl.dot`, added to the tile of V, squared and summed;
the same 2 N K r operations, and U would not fit the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import by_rank, cdiv, device_of, launchable, on_device, precision, rows_of

# Largest rank whose A is read as it is, in fp32: every row block reads it again, from L2, but a cast is a launch more.
AS_IT_IS = 16


@triton.jit
def dora_gain_factored_kernel(
    V, A, B, v_sqnorm, m, m_b, partial, gain, inv_norm,
    N, K, r, s, v_stride, a_stride, b_stride, k_chunk,
    HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows of block i, columns of chunk j of SPLIT; r <= BLOCK_R. Writes 2 s <V, BA> + s^2 |BA|^2 of
    its columns into partial [SPLIT, N] where SPLIT > 1. SPLIT_G: B G by tf32, where the GPU has it.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < N
    first = tl.program_id(1) * k_chunk
    last = tl.minimum(first + k_chunk, K)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    v_rows = V + rows.to(tl.int64)[:, None] * v_stride
    a_rows = A + ranks.to(tl.int64)[:, None] * a_stride
    if BLOCK_R <= 16:  # fetched while V streams; more of it would take too many registers for as long
        b = _factor(B, rows, ranks, row_in, r, b_stride, V.dtype.element_ty)
    u = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    g = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    # Chunks end at multiples of BLOCK_K: the mask by K alone lets the compiler see aligned rows, and load 16 bytes.
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        at = k + columns
        column_in = at < K
        v = tl.load(v_rows + at[None, :], mask=row_in[:, None] & column_in[None, :], other=0.0)
        a = tl.load(a_rows + at[None, :], mask=(ranks < r)[:, None] & column_in[None, :], other=0.0)
        a = a.to(V.dtype.element_ty)
        u = tl.dot(v, tl.trans(a), u)
        g = tl.dot(a, tl.trans(a), g)
    if BLOCK_R > 16:
        b = _factor(B, rows, ranks, row_in, r, b_stride, V.dtype.element_ty)
    b = b.to(tl.float32)
    u *= 2.0 * s
    g *= s * s
    if SPLIT_G:
        # b has no more bits than tf32 keeps; g in two parts that it keeps loses less than fp32 sums do.
        high = (g.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        u = tl.dot(b, high, u, input_precision="tf32")
        u = tl.dot(b, g - high, u, input_precision="tf32")
    else:
        u = tl.dot(b, g, u, input_precision="ieee")
    rest = tl.sum(b * u, 1)
    if SPLIT == 1:
        rest += tl.load(v_sqnorm + rows, mask=row_in, other=0.0)
        _finish(rest, m, m_b, gain, inv_norm, rows, row_in, HAS_MASK)
    else:
        tl.store(partial + tl.program_id(1).to(tl.int64) * N + rows, rest, mask=row_in)


@triton.jit
def dora_gain_kernel(
    V, A, B, m, m_b, partial, gain, inv_norm,
    N, K, r, s, v_stride, a_stride, b_stride, k_chunk,
    HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): rows of block i, columns of chunk j of SPLIT. Writes partial [SPLIT, N] where SPLIT > 1.

    ONE_BLOCK: r <= BLOCK_R; otherwise A and B are in V's dtype.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < N
    first = tl.program_id(1) * k_chunk
    last = tl.minimum(first + k_chunk, K)
    ranks = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    v_rows = V + rows.to(tl.int64)[:, None] * v_stride
    if ONE_BLOCK:
        squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        b = _factor(B, rows, ranks, row_in, r, b_stride, V.dtype.element_ty)
    else:
        sqnorm = tl.zeros((BLOCK_N,), tl.float32)
    # Chunks end at multiples of BLOCK_K: the mask by K alone lets the compiler see aligned rows, and load 16 bytes.
    # num_stages here: the tile of V does not feed the product, and would not be fetched ahead otherwise.
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        at = k + columns
        column_in = at < K
        v_at, v_in = v_rows + at[None, :], row_in[:, None] & column_in[None, :]
        low = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        a_at = A + ranks.to(tl.int64)[:, None] * a_stride + at[None, :]
        if ONE_BLOCK:
            v = tl.load(v_at, mask=v_in, other=0.0)
            a = tl.load(a_at, mask=(ranks < r)[:, None] & column_in[None, :], other=0.0)
            low = tl.dot(b, a.to(V.dtype.element_ty), low, input_precision=PRECISION)
            w = v.to(tl.float32) + s * low
            squares += w * w
        else:
            for start in range(0, r, BLOCK_R):
                of_rank = start + ranks
                a = tl.load(a_at, mask=(of_rank < r)[:, None] & column_in[None, :], other=0.0)
                b = _factor(B, rows, of_rank, row_in, r, b_stride, V.dtype.element_ty)
                low = tl.dot(b, a, low, input_precision=PRECISION)
                a_at += BLOCK_R * a_stride
            w = tl.load(v_at, mask=v_in, other=0.0).to(tl.float32) + s * low
            sqnorm += tl.sum(w * w, 1)
    if ONE_BLOCK:
        sqnorm = tl.sum(squares, 1)
    if SPLIT == 1:
        _finish(sqnorm, m, m_b, gain, inv_norm, rows, row_in, HAS_MASK)
    else:
        tl.store(partial + tl.program_id(1).to(tl.int64) * N + rows, sqnorm, mask=row_in)


@triton.jit
def _factor(B, rows, ranks, row_in, r, b_stride, dtype: tl.constexpr):
    """b [BLOCK_N, BLOCK_R] in the dtype of the product."""
    at = B + rows.to(tl.int64)[:, None] * b_stride + ranks[None, :]
    return tl.load(at, mask=row_in[:, None] & (ranks < r)[None, :], other=0.0).to(dtype)


@triton.jit
def _finish(sqnorm, m, m_b, gain, inv_norm, rows, row_in, HAS_MASK: tl.constexpr):
    # A row of zeros has inv_norm 0, not inf.
    inverse = tl.where(sqnorm > 0, tl.math.rsqrt(tl.where(sqnorm > 0, sqnorm, 1.0)), 0.0)
    value = tl.load(m + rows, mask=row_in, other=0.0).to(tl.float32) * inverse
    if HAS_MASK:
        value *= tl.load(m_b + rows, mask=row_in, other=0.0).to(tl.float32)
    tl.store(inv_norm + rows, inverse, mask=row_in)
    tl.store(gain + rows, value, mask=row_in)


@triton.jit
def dora_gain_finish_kernel(
    partial, v_sqnorm, m, m_b, gain, inv_norm, N,
    HAS_MASK: tl.constexpr, FACTORED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial [SPLIT, N] summed in order, |V|^2 first where FACTORED, then as the kernels above end."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < N
    sqnorm = tl.zeros((BLOCK_N,), tl.float32)
    if FACTORED:
        sqnorm += tl.load(v_sqnorm + rows, mask=row_in, other=0.0)
    for part in range(SPLIT):
        sqnorm += tl.load(partial + tl.cast(part, tl.int64) * N + rows, mask=row_in, other=0.0)
    _finish(sqnorm, m, m_b, gain, inv_norm, rows, row_in, HAS_MASK)


MOST_FACTORED = 64  # largest rank by U = V A^T: more columns of it do not fit the registers
MOST_CHUNKS = 8


def chunks_for(tiles: int, slots: int, most: int) -> int:
    """Into how many chunks of K row blocks are cut: the fewest that keep nearly as many of the slots (programs that run
    at once) busy as any other number, to the last round.

    344 programs of one length on 264 slots take as long as 528: three chunks of each take 4 rounds of a third.
    """
    if tiles >= 4 * slots:
        return 1

    def busy(chunks: int) -> float:
        return tiles * chunks / (slots * cdiv(tiles * chunks, slots))

    some = range(1, max(1, min(most, MOST_CHUNKS)) + 1)
    best = max(map(busy, some))
    return next(chunks for chunks in some if busy(chunks) >= 0.95 * best)


def dora_gain(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    """(gain, inv_norm), fp32 [N], as `prunekern.ops.dora_gain` says. Products are made in V's dtype, sums in fp32.

    Reads V once. Up to rank 64 a row block sees all of K, or a few chunks of it where the row blocks do not fill the
    multiprocessors evenly (`chunks_for`); above, tiles of the matrix V + s B A are programs of their own. A second
    launch adds up the sums of chunks in order.
    """
    (N, K), r = V.shape, A.shape[0]
    gain, inv_norm = (torch.empty(N, dtype=torch.float32, device=V.device) for _ in range(2))
    if N == 0:
        return gain, inv_norm
    architecture, processors = device_of(V)
    factored = V.itemsize == 2 and r <= MOST_FACTORED
    chosen = by_rank("dora_gain_factored" if factored else "dora_gain", architecture, V.dtype, r)
    one_block = chosen["ONE_BLOCK"]
    V, A, B = rows_of(V), rows_of(A), rows_of(B)
    if not one_block or (V.itemsize == 2 and r > AS_IT_IS):
        A = A.to(V.dtype)
    tiles = cdiv(N, chosen["BLOCK_N"])
    if one_block:
        # As many at once as registers and shared memory leave room for (bench/results/aot.json).
        resident = 2 if r <= 16 and architecture != "sm_86" else 1
        split = chunks_for(tiles, resident * processors, cdiv(K, 2 * chosen["BLOCK_K"]))
    else:
        split, B = cdiv(K, chosen["BLOCK_K"]), B.to(V.dtype)  # read once a tile: narrow, and ready for the product
    split = max(1, min(split, 65535))
    chunk = max(1, cdiv(cdiv(K, split), chosen["BLOCK_K"])) * chosen["BLOCK_K"]
    split = max(1, cdiv(K, chunk))
    partial = torch.empty(split, N, dtype=torch.float32, device=V.device) if split > 1 else gain
    m, mask = m.contiguous(), m if m_b is None else m_b.contiguous()
    v_sqnorm = v_sqnorm.contiguous()
    sizes = (N, K, r, s, V.stride(0), A.stride(0), B.stride(0), chunk)
    with on_device(V):
        if factored:
            chosen.pop("ONE_BLOCK")
            launchable(dora_gain_factored_kernel)[(tiles, split)](
                V, A, B, v_sqnorm, m, mask, partial, gain, inv_norm, *sizes, HAS_MASK=m_b is not None, SPLIT=split,
                SPLIT_G=not architecture.startswith("gfx"), **chosen,
            )  # fmt: skip
        else:
            launchable(dora_gain_kernel)[(tiles, split)](
                V, A, B, m, mask, partial, gain, inv_norm, *sizes, HAS_MASK=m_b is not None, SPLIT=split,
                PRECISION=precision(V.dtype, architecture), **chosen,
            )  # fmt: skip
        if split > 1:
            launchable(dora_gain_finish_kernel)[(cdiv(N, 128),)](
                partial, v_sqnorm, m, mask, gain, inv_norm, N, HAS_MASK=m_b is not None, FACTORED=factored, SPLIT=split,
                BLOCK_N=128, num_warps=4,
            )  # fmt: skip
    return gain, inv_norm
