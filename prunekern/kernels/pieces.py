"""Triton: what the kernels of compact layers share."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)  # NaN stays; tl.maximum would make it 0
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) is sigmoid(2 u)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "quick_gelu":
        z = z * tl.sigmoid(1.702 * z)
    return z


@triton.jit
def widen(w, DOT: tl.constexpr):
    """A tile of weights in the dtype of the products; int8 by way of fp32, exactly."""
    if w.dtype == tl.int8:
        w = w.to(tl.float32)
    return w.to(DOT)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column block) of this program: groups of GROUP row blocks walk the columns together."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * tiles_n)
    within = tl.program_id(0) % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    return group * GROUP + within % height, within // height


@triton.jit
def position(columns, out_index, N, SEARCH: tl.constexpr):
    """(position in out_index [N], whether it is there) of each column; 2^SEARCH > N."""
    low = tl.zeros_like(columns)  # entries of out_index below it are less than the column
    high = low + N
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        open_ = low < high
        less = tl.load(out_index + middle, mask=open_, other=0) < columns
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    return low, tl.load(out_index + low, mask=low < N, other=-1) == columns


def dot_dtype(x: Tensor, *weights: Tensor) -> torch.dtype:
    """What products are made in: x's 16 bits where every weight has them too (int8 fits them exactly), else fp32."""
    return x.dtype if {t.dtype for t in weights} <= {x.dtype, torch.int8} else torch.float32


TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
