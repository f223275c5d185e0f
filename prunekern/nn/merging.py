"""Masked DoRA folded into one plain weight: in memory and from file to file by the same arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

ROWS = 256  # rows that are picked or cast at once: 11 MB in fp32 at 11008 columns


def pick(values: Tensor, rows: Tensor | None, cols: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Kept rows of values [N, ...], and kept columns where it has any, in memory of their own.

    rows, cols: int64, None for all. dtype: of the result; None: that of values. Beside the result a block of rows is
    held, so that values may be mapped from a file larger than memory.
    """
    cols = cols if values.dim() == 2 else None
    count = values.shape[0] if rows is None else rows.numel()
    width = values.shape[1:] if cols is None else (cols.numel(),)
    out = values.new_empty(count, *width, dtype=values.dtype if dtype is None else dtype)
    for into, start in zip(out.split(ROWS), range(0, count, ROWS), strict=True) if count else ():
        end = min(start + ROWS, count)
        block = values[start:end] if rows is None else values.index_select(0, rows[start:end])
        into.copy_(block if cols is None else block.index_select(1, cols))
    return out


@torch.no_grad()
def merge(
    V: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    s: float,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """magnitude * (V + s B A) / ||V + s B A||, restricted to kept rows and columns; the norm is that of the full row.

    V: [N, K], A: [r, K], B: [N, r], magnitude: [N]; rows, cols: sorted int64, None for all. dtype: of the result, to
    which V is rounded first; None: that of V. Computed in fp32 (float64 for float64) -> [len(rows), len(cols)].
    Source: DoRA (Liu et al. 2024); see `ops.dora_gain` and `ops.dora_merge`.
    """
    dtype = V.dtype if dtype is None else dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Copied, all of them: where a mapped tensor begins in memory can change the last bits of a product.
    A, B, magnitude = (t.detach().to(wide, copy=True) for t in (A, B, magnitude))
    gain = _gain(V.detach().to(dtype), A, B, magnitude, s)
    if V.device.type != "cpu":  # one kernel reads V and writes what is kept
        return ops.dora_merge(V.detach().to(dtype), A, B, gain, rows, cols, s)
    W = pick(V.detach(), rows, cols, dtype)
    A = A if cols is None else A.index_select(1, cols)
    if rows is not None:
        B, gain = B.index_select(0, rows), gain.index_select(0, rows)
    return ops.dora_merge(W, A, B, gain, None, None, s)


def _gain(V: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, s: float) -> Tensor:
    """magnitude / ||V + s B A||, [N]. A function of its own: the wide copy of V is gone when it returns."""
    V = V.to(A.dtype, copy=True)
    return ops.dora_gain(V, A, B, magnitude, None, s, ops.row_sqnorm(V))[0]
