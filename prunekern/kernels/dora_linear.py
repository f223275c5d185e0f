"""Triton: forward and backward of a masked DoRA layer around the vendor's matrix products, and all of it in one.

    z = x V^T + s p B^T  with p = x A^T        y = gain * z + bias

`compose` takes z0 = x V^T from the vendor's GEMM and does the rest in one pass over the output (above rank 64 the
vendor adds p B^T too: the pass would make it of many small tiles); `fused` is a GEMM
whose last K blocks are p B^T and whose epilogue is gain and bias. `backward` is one pass over dy: dz = gain * dy, and
by blocks of rows the sums of dy * z and dy, to be added up in order afterwards: no atomics, bitwise repeatable. It
makes no product either: where z lacks s p B^T, its part of the sum of dy * z is s <B, dy^T p> by rows, and dy^T p is
what the gradient of B is made of anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import by_rank, cdiv, device_of, launchable, on_device, pick, precision, rows_of


@triton.jit
def _factor(B, columns, column_in, r, b_stride, BLOCK_R: tl.constexpr):
    """B^T [BLOCK_R, BLOCK_N] of these columns; r <= BLOCK_R."""
    ranks = tl.arange(0, BLOCK_R)
    at = B + columns.to(tl.int64)[None, :] * b_stride + ranks[:, None]
    return tl.load(at, mask=(ranks < r)[:, None] & column_in[None, :], other=0.0)


@triton.jit
def _low_rank(p, b, rows, row_in, r, p_stride, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """p B^T [BLOCK_T, BLOCK_N] of these rows; b: `_factor`, made once for all rows of a program."""
    ranks = tl.arange(0, BLOCK_R)
    at = p + rows.to(tl.int64)[:, None] * p_stride + ranks[None, :]
    low = tl.load(at, mask=row_in[:, None] & (ranks < r)[None, :], other=0.0)
    return tl.dot(low, b, input_precision=PRECISION)


@triton.jit
def dora_compose_kernel(
    z, p, B, gain, bias, y,
    T, N, r, s, p_stride, b_stride, chunk,
    ADD_LOW: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = gain * (z + s p B^T) + bias, in one pass; z and y [T, N] contiguous. Program (i, j): columns of block i, rows
    of chunk j. ADD_LOW: z lacks s p B^T, and r <= BLOCK_R.
    """
    # One grid axis, columns fastest: neighbours read on in memory, and only the first axis may be long.
    tiles_n = tl.cdiv(N, BLOCK_N)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < N
    factor = tl.load(gain + columns, mask=column_in, other=0.0)
    if ADD_LOW:
        b = _factor(B, columns, column_in, r, b_stride, BLOCK_R)
    if HAS_BIAS:
        shift = tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32)
    first = (tl.program_id(0) // tiles_n) * chunk
    last = tl.minimum(first + chunk, T)
    # num_stages here: z feeds no product, and would not be fetched ahead otherwise.
    for t in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = t + tl.arange(0, BLOCK_T)
        row_in = rows < last
        inside = row_in[:, None] & column_in[None, :]
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        if ADD_LOW:
            value += s * _low_rank(p, b, rows, row_in, r, p_stride, BLOCK_R, PRECISION)
        out = factor[None, :] * value
        if HAS_BIAS:
            out += shift[None, :]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dora_fused_kernel(
    x, V, p, B, gain, bias, y, z,
    T, N, K, r, s, x_stride, v_stride, p_stride, b_stride,
    HAS_BIAS: tl.constexpr, KEEP_Z: tl.constexpr, BLOCK_R: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One GEMM: z = x V^T + s p B^T in registers; y = gain * z + bias. KEEP_Z: z is written for the backward pass."""
    # Programs in groups of GROUP row blocks walk the columns together, so that their tiles of V meet in the L2 cache.
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    within = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_t - group * GROUP, GROUP)
    rows = (group * GROUP + within % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in, column_in = rows < T, columns < N
    ks = tl.arange(0, BLOCK_K)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + ks[None, :]
    v_at = V + columns.to(tl.int64)[None, :] * v_stride + ks[:, None]
    if ONE_BLOCK:
        factor = _factor(B, columns, column_in, r, b_stride, BLOCK_R)
        acc = _low_rank(p, factor, rows, row_in, r, p_stride, BLOCK_R, PRECISION)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, r, BLOCK_R):
            factor = _factor(B + start, columns, column_in, r - start, b_stride, BLOCK_R)
            acc += _low_rank(p + start, factor, rows, row_in, r - start, p_stride, BLOCK_R, PRECISION)
    acc *= s
    for k in range(0, K, BLOCK_K):
        k_in = k + ks < K
        a = tl.load(x_at, mask=row_in[:, None] & k_in[None, :], other=0.0)
        b = tl.load(v_at, mask=k_in[:, None] & column_in[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_at += BLOCK_K
        v_at += BLOCK_K
    inside = row_in[:, None] & column_in[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if KEEP_Z:
        tl.store(z + at, acc.to(z.dtype.element_ty), mask=inside)
    out = acc * tl.load(gain + columns, mask=column_in, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def dora_backward_kernel(
    dy, z, p, B, gain, bias, dz, d_gain, d_bias, d_probe,
    T, N, r, s, dy_stride, p_stride, b_stride, chunk,
    ADD_LOW: tl.constexpr, WANT_DZ: tl.constexpr, WANT_GAIN: tl.constexpr, WANT_BIAS: tl.constexpr,
    WANT_PROBE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): columns of block i, rows of chunk j. dz = gain * dy; d_gain, d_bias [chunks, N]: its part of the
    sums of dy * z and dy over rows, z as it is; d_probe of (dy * y)^2. ADD_LOW: z lacks the low-rank part, which y in
    the probe needs (it came from the vendor's GEMM), and r <= BLOCK_R.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_in = columns < N
    factor = tl.load(gain + columns, mask=column_in, other=0.0)
    of_gain = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    of_bias = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    of_probe = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    shift = tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32) if HAS_BIAS else 0.0 * factor
    if ADD_LOW and WANT_PROBE:
        b = _factor(B, columns, column_in, r, b_stride, BLOCK_R)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, T)
    # num_stages here: dy and z feed no product, and would not be fetched ahead otherwise.
    for t in tl.range(first, last, BLOCK_T, num_stages=STAGES):
        rows = t + tl.arange(0, BLOCK_T)
        row_in = rows < last
        inside = row_in[:, None] & column_in[None, :]
        at = rows.to(tl.int64)[:, None] * N + columns[None, :]
        grad_at = dy + rows.to(tl.int64)[:, None] * dy_stride + columns[None, :]
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        if WANT_GAIN or WANT_PROBE:
            value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            of_gain += grad * value
            if WANT_PROBE:
                if ADD_LOW:
                    value += s * _low_rank(p, b, rows, row_in, r, p_stride, BLOCK_R, PRECISION)
                lost = grad * (factor[None, :] * value + shift[None, :])
                of_probe += lost * lost
        if WANT_BIAS:
            of_bias += grad
        if WANT_DZ:
            tl.store(dz + at, (grad * factor[None, :]).to(dz.dtype.element_ty), mask=inside)
    part = tl.program_id(1).to(tl.int64) * N + columns
    if WANT_GAIN:
        tl.store(d_gain + part, tl.sum(of_gain, 0), mask=column_in)
    if WANT_BIAS:
        tl.store(d_bias + part, tl.sum(of_bias, 0), mask=column_in)
    if WANT_PROBE:
        tl.store(d_probe + part, tl.sum(of_probe, 0), mask=column_in)


FUSED_BELOW = 33  # rows; see `takes_fused`


def takes_fused(T: int) -> bool:
    """Whether one Triton GEMM is taken in place of the vendor's and `compose`.

    Few rows leave the GPU waiting for launches and for V: one kernel in place of three then counts more than the
    vendor's better product. The bound is reasoned, not measured on a GPU: with more rows our tiles fill the chip less
    well than the vendor's split products. `bench/gpu/layers.py` times both routes.
    """
    return T < FUSED_BELOW


def adds_low(x: Tensor, T: int, r: int) -> bool:
    """Whether z comes from the vendor without s p B^T, which compose and backward then add as they go."""
    return not takes_fused(T) and bool(by_rank("dora_compose", device_of(x)[0], x.dtype, r)["ONE_BLOCK"])


def forward(
    x: Tensor, V: Tensor, A: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, x_lora: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor, Tensor, bool]:  # fmt: skip
    """y [T, N], z [T, N], p [T, r], and whether z lacks the low-rank part. x and x_lora [T, K]; all in one dtype
    but gain and bias.

    z is not to be read where keep_z is False.
    """
    (T, K), (N, r) = x.shape, B.shape
    architecture, _ = device_of(x)
    B, gain = rows_of(B), gain.contiguous()
    p = (x if x_lora is None else x_lora) @ A.T
    absent = gain  # a pointer for what is not there; never read or written
    bias_or = absent if bias is None else bias.contiguous()
    y = torch.empty(T, N, dtype=x.dtype, device=x.device)
    common = {"HAS_BIAS": bias is not None, "PRECISION": precision(x.dtype, architecture)}
    composed = by_rank("dora_compose", architecture, x.dtype, r)
    one_block = composed.pop("ONE_BLOCK")
    if takes_fused(T):
        x, V = rows_of(x), rows_of(V)
        z = torch.empty_like(y) if keep_z else absent
        chosen = pick("dora_fused", architecture, x.dtype, T)
        rank = {"BLOCK_R": composed["BLOCK_R"], "ONE_BLOCK": one_block}
        grid = (cdiv(T, chosen["BLOCK_T"]) * cdiv(N, chosen["BLOCK_N"]),)
        if T and N:
            with on_device(x):
                launchable(dora_fused_kernel)[grid](
                    x, V, p, B, gain, bias_or, y, z, T, N, K, r, s, x.stride(0), V.stride(0), p.stride(0), B.stride(0),
                    KEEP_Z=keep_z, **common, **rank, **chosen,
                )  # fmt: skip
        return y, z, p, False
    z, add_low = x @ V.T, adds_low(x, T, r)
    if not add_low:
        z.addmm_(p, B.T, alpha=s)
    compose(z, p, B, gain, bias, s, add_low, y)
    return y, z, p, add_low


def compose(
    z: Tensor, p: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float, add_low: bool, y: Tensor
) -> None:
    """y = gain * (z + s p B^T) + bias, into y; z and y [T, N] contiguous. add_low: z lacks s p B^T."""
    (T, N), r = z.shape, B.shape[1]
    if not (T and N):
        return
    architecture, processors = device_of(z)
    chosen = by_rank("dora_compose", architecture, z.dtype, r)
    if add_low and not chosen["ONE_BLOCK"]:
        raise AssertionError(f"dora_compose: rank {r} is added by the vendor's product")
    tiles = cdiv(N, chosen["BLOCK_N"])
    # B is read once a program, so several tiles of rows each; but programs enough to keep every multiprocessor busy.
    chunks = max(1, min(8 * processors // tiles, cdiv(T, chosen["BLOCK_T"])))
    chunk = cdiv(cdiv(T, chunks), chosen["BLOCK_T"]) * chosen["BLOCK_T"]
    with on_device(z):
        launchable(dora_compose_kernel)[(tiles * cdiv(T, chunk),)](
            z, p, B, gain, gain if bias is None else bias.contiguous(), y, T, N, r, s, p.stride(0), B.stride(0), chunk,
            ADD_LOW=add_low, HAS_BIAS=bias is not None, PRECISION=precision(z.dtype, architecture),
            **{name: value for name, value in chosen.items() if name != "ONE_BLOCK"},
        )  # fmt: skip


def backward(
    dy: Tensor, z: Tensor, p: Tensor, B: Tensor, gain: Tensor, bias: Tensor | None, s: float,
    add_low: bool, want_dz: bool, want_gain: bool, want_bias: bool, want_probe: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dz [T, N]; d_gain, d_bias and d_probe [N], fp32; what is not wanted is empty. dy [T, N], z, p, B in one dtype.

    d_gain is the sum of dy * z: with add_low, where z lacks s p B^T, s <B, dy^T p> by rows is still to be added.
    p, B and bias are read for the probe only.
    """
    (T, N), r = dy.shape, B.shape[1]
    architecture, processors = device_of(dy)
    chosen = by_rank("dora_backward", architecture, dy.dtype, r)
    if not chosen.pop("ONE_BLOCK") and add_low:
        raise AssertionError(f"dora_backward: rank {r} is added by the vendor's product")
    dy, B, gain = rows_of(dy), rows_of(B), gain.contiguous()
    tiles = cdiv(N, chosen["BLOCK_N"])
    # Many waves of programs, so that the last one costs little; but at least four tiles each, as every chunk more is a
    # row of partial sums to write and read again.
    chunks = max(1, min(cdiv(16 * processors, max(1, tiles)), cdiv(T, 4 * chosen["BLOCK_T"])))
    chunk = max(1, cdiv(cdiv(T, chunks), chosen["BLOCK_T"])) * chosen["BLOCK_T"]
    chunks = max(1, cdiv(T, chunk))
    dz = torch.empty(dy.shape if want_dz else 0, dtype=dy.dtype, device=dy.device)
    d_gain = torch.empty(chunks, N if want_gain else 0, dtype=torch.float32, device=dy.device)
    d_bias = torch.empty(chunks, N if want_bias else 0, dtype=torch.float32, device=dy.device)
    d_probe = torch.empty(chunks, N if want_probe else 0, dtype=torch.float32, device=dy.device)
    bias_or = gain if bias is None else bias.contiguous()
    if N:
        with on_device(dy):
            launchable(dora_backward_kernel)[(tiles, chunks)](
                dy, z, p, B, gain, bias_or, dz, d_gain, d_bias, d_probe,
                T, N, r, s, dy.stride(0), p.stride(0), B.stride(0), chunk,
                ADD_LOW=add_low, WANT_DZ=want_dz, WANT_GAIN=want_gain, WANT_BIAS=want_bias, WANT_PROBE=want_probe,
                HAS_BIAS=bias is not None, PRECISION=precision(dy.dtype, architecture), **chosen,
            )  # fmt: skip
    return dz, d_gain.sum(0), d_bias.sum(0), d_probe.sum(0)
