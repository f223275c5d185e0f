"""`prunekern::dora_merge`: fold V, A, B and gain into one weight, writing kept rows and columns only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from prunekern import kernels

from . import checks
from .flops import Shape, count
from .registering import register


def dora_merge_reference(
    V: Tensor,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    s: float = 1.0,
) -> Tensor:
    """The definition on the whole matrix, then the removal."""
    dtype = checks.compute_dtype(V, A, B, gain)
    W: Tensor = gain.to(dtype)[:, None] * (V.to(dtype) + s * (B.to(dtype) @ A.to(dtype)))
    W = W if rows is None else W[rows]
    W = W if cols is None else W[:, cols]
    return W.to(V.dtype)


_SCHEMA = "(Tensor V, Tensor A, Tensor B, Tensor gain, Tensor? rows, Tensor? cols, float s=1.0) -> Tensor"


def _compute(
    V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float = 1.0
) -> Tensor:
    dtype = checks.compute_dtype(V, A, B, gain)
    if rows is not None:
        V, B, gain = V.index_select(0, rows), B.index_select(0, rows), gain.index_select(0, rows)
    if cols is not None:
        V, A = V.index_select(1, cols), A.index_select(1, cols)
    with checks.without_autocast(V.device):
        out, A, B = V.dtype, A.to(dtype), B.to(dtype)
        if V.dtype is dtype:
            merged = torch.addmm(V, B, A, alpha=s)  # [rows, cols]
        else:  # the copy of V is ours: a linear less in memory
            merged = V.to(dtype).addmm_(B, A, alpha=s)
    return merged.mul_(gain.to(dtype)[:, None]).to(out)


def _check(V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
    op = "dora_merge"
    checks.shape(op, "V", V, (None, None))
    (N, K), r = V.shape, A.shape[0] if A.dim() else None
    checks.shape(op, "A", A, (r, K))
    checks.shape(op, "B", B, (N, r))
    checks.shape(op, "gain", gain, (N,))
    for name, tensor in (("V", V), ("A", A), ("B", B), ("gain", gain)):
        checks.floating(op, name, tensor)
    checks.same_device(op, "V", V.device, A=A, B=B, gain=gain, rows=rows, cols=cols)


def _empty(
    V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float = 1.0
) -> Tensor:
    N = V.shape[0] if rows is None else rows.shape[0]
    K = V.shape[1] if cols is None else cols.shape[0]
    return V.new_empty(N, K)


def _flops(
    V: Shape, A: Shape, B: Shape, gain: Shape, rows: Shape | None, cols: Shape | None, *rest: Any, **kwargs: Any
) -> int:
    return 2 * (V[0] if rows is None else rows[0]) * (V[1] if cols is None else cols[0]) * A[0]


_forward = register("dora_merge_forward" + _SCHEMA, _compute, flops=_flops, fake=_empty)


@functools.cache
def triton_op() -> Callable[..., Tensor]:
    """`prunekern::dora_merge_triton`, registered when first asked for."""
    from ..kernels.dora_merge import dora_merge as launch

    def dora_merge_triton(
        V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float
    ) -> Tensor:
        return launch(V, A, B, gain, rows, cols, s)

    op = torch.library.triton_op("prunekern::dora_merge_triton", dora_merge_triton, mutates_args=())
    count("dora_merge_triton", _flops)
    return op


kernels.register_early(triton_op)


def _dora_merge(
    V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float = 1.0
) -> Tensor:
    _check(V, A, B, gain, rows, cols)
    for name, index, size in (("rows", rows, V.shape[0]), ("cols", cols, V.shape[1])):
        if index is not None:
            checks.kept_index("dora_merge", name, index, size)
    usable = kernels.usable(V, A, B, gain, rank=A.shape[0])
    merged: Tensor = (triton_op() if usable else _forward)(V, A, B, gain, rows, cols, s)
    return merged


def _fake(
    V: Tensor, A: Tensor, B: Tensor, gain: Tensor, rows: Tensor | None, cols: Tensor | None, s: float = 1.0
) -> Tensor:
    _check(V, A, B, gain, rows, cols)  # a compiled graph, or one argument on meta, comes here only
    return _empty(V, A, B, gain, rows, cols, s)


def _backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("dora_merge: has no gradient; train through dora_linear")


register("dora_merge" + _SCHEMA, _dora_merge, flops=_flops, fake=_fake, backward=_backward)


def dora_merge(
    V: Tensor,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    s: float = 1.0,
) -> Tensor:
    """W' = gain * (V + s B A), restricted to kept rows and columns.

    V [N, K], A [r, K], B [N, r], gain [N] (it holds the norm of the *full* row, so removing columns does not
    change it); rows, cols: sorted int64 kept indices or None (all). Returns [len(rows), len(cols)] in V's dtype,
    computed in fp32 (float64 for float64). ValueError / TypeError on what does not fit; not differentiable: a backward
    pass raises RuntimeError.
    """
    checks.tensors("dora_merge", {"V": V, "A": A, "B": B, "gain": gain}, {"rows": rows, "cols": cols})
    merged: Tensor = torch.ops.prunekern.dora_merge(V, A, B, gain, rows, cols, s)
    return merged
