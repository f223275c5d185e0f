"""compact_attention: attention whose heads have different widths, none of them padded; of encoders and decoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekern import _native

from . import calls, checks
from .flops import Shape
from .registering import register

OP = "compact_attention"
_RUN: Callable[..., None] | None = _native.core().compact_attention if _native.available() else None
# The whole eager call in one C function (csrc/python/attention.cpp), which gives None for a call that it leaves to the
# op; None without the core or with torch < 2.10.
_EAGER: Callable[..., Tensor | None] | None = _native.core().call_attention if calls.EAGER else None
_f32 = torch.float32
ARITHMETIC = {"fp32": 0, "bf16": 1}  # the numbers the C++ core knows them by


def compact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_first: Sequence[int],
    v_first: Sequence[int],
    key_mask: Tensor | None = None,
    scale: float = 1.0,
    shared_by: int = 1,
    causal: bool = False,
    arithmetic: str = "fp32",
    window: int | None = None,
) -> Tensor:
    """y_h = softmax(scale q_h k_h^T) v_h for every sequence and head h, over the keys that key_mask allows.

    Schema: `prunekern::compact_attention(Tensor q, Tensor k, Tensor v, int[] qk_first, int[] v_first,
    Tensor? key_mask, float scale, int shared_by=1, bool causal=False, str arithmetic="fp32", int? window=None) ->
    Tensor`.

    Args:
        q: [batch, queries, shared_by C], any strides; float64 computes in float64, float32, bfloat16 and float16 in
            float32.
        k: [batch, keys, C].
        v: [batch, keys, D].
        qk_first: heads + 1 ints, ascending from 0 to C: key/value head h has key channels qk_first[h] to
            qk_first[h + 1]. A head without any averages its values over the allowed keys.
        v_first: heads + 1 ints, ascending from 0 to D: the same for values.
        key_mask: bool [batch, keys], True where a key may be read, or None: all may. What a forbidden key and its
            value hold does not matter, not even NaN. A query without any allowed key gives zeros.
        scale: of the logits.
        shared_by: query heads of each key/value head (grouped queries); in q and y they stand side by side, from
            shared_by qk_first[h] and shared_by v_first[h] on.
        causal: the queries are the last of the tokens that k and v hold: query i sees keys 0 to keys - queries + i.
        arithmetic: "fp32", or "bf16": the C++ kernel may round q, k, v and attention weights to bfloat16 before it
            multiplies them, and does so where the CPU is faster so and there is more than one query; sums and the
            softmax stay float32.
        window: queries and keys are of the same tokens, and query i sees keys i - window to i + window; None: no limit.

    Returns y [batch, queries, shared_by D] in the dtype of q. On the CPU, in float32 (and in 16 bits, by way of it) and
    where no gradient is needed, the C++ kernel runs; anything else runs the PyTorch reference. Differentiable in q, k
    and v. Raises ValueError (shapes, devices) or TypeError (dtypes), naming the argument.
    """
    if _EAGER and calls.short() and not calls.needs_grad(q, k, v) and (window is None or window >= 0):
        number = ARITHMETIC.get(arithmetic, -1) if type(arithmetic) is str else -1
        y = _EAGER(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, calls.threads(), number,
                   -1 if window is None else window)  # fmt: skip
        if y is not None:
            return y
    checks.tensors(OP, {"q": q, "k": k, "v": v}, {"key_mask": key_mask})
    if calls.transformed():
        _check(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, arithmetic, window)
        return compact_attention_reference(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, window)
    read: Tensor = torch.ops.prunekern.compact_attention(
        q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, arithmetic, window
    )  # fmt: skip
    return read


def compact_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_first: Sequence[int],
    v_first: Sequence[int],
    key_mask: Tensor | None = None,
    scale: float = 1.0,
    shared_by: int = 1,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """The same in plain PyTorch, head by head; differentiable; never calls the C++ core."""
    dtype = checks.compute_dtype(q, k, v)  # 16 bits never meet a matmul
    q, k, v, key_mask, out = *_readable(q, k, v, key_mask, dtype), q.dtype
    may_read = _may_read(q, k, key_mask, causal, window)
    with checks.without_autocast(q.device):
        parts = [
            _weights(q[..., a], k[..., b], may_read, scale) @ v[..., c]  # [batch, queries, d]
            for a, b, c in _heads(qk_first, v_first, shared_by)
        ]
    y = torch.cat(parts, -1) if parts else q.new_zeros(*q.shape[:-1], 0)
    return y.to(out)


def _heads(qk_first: Sequence[int], v_first: Sequence[int], shared_by: int) -> Iterator[tuple[slice, slice, slice]]:
    """(query, key, value channels) of every query head, as slices."""
    for a, b, c, d in zip(qk_first, qk_first[1:], v_first, v_first[1:], strict=False):
        for i in range(shared_by):
            first = shared_by * a + i * (b - a)
            yield slice(first, first + b - a), slice(a, b), slice(c, d)


def _readable(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v in `dtype`, forbidden keys and values zero; key_mask as it meets the logits, [batch, 1, keys]."""
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if key_mask is None:
        return q, k, v, None
    forbidden = ~key_mask.unsqueeze(-1)
    return q, k.masked_fill(forbidden, 0.0), v.masked_fill(forbidden, 0.0), key_mask.unsqueeze(1)


def _may_read(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool, window: int | None = None) -> Tensor | None:
    """bool [batch or 1, queries or 1, keys], or None: everyone reads everything. key_mask: [batch, 1, keys]."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None:
        near = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(-window).tril(window).unsqueeze(0)
        return near if key_mask is None else near & key_mask
    if not causal or queries == 1:
        return key_mask
    before = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries).unsqueeze(0)
    return before if key_mask is None else before & key_mask


def _weights(q: Tensor, k: Tensor, may_read: Tensor | None, scale: float) -> Tensor:
    """Attention weights of one head, [batch, queries, keys]; all zero where no key may be read."""
    logits = scale * (q @ k.transpose(1, 2))
    if may_read is None:
        return logits.softmax(-1)
    lowest = torch.finfo(logits.dtype).min  # finite: a row of nothing else has a softmax, and a gradient
    return logits.masked_fill(~may_read, lowest).softmax(-1) * may_read


# --- checks and the C++ path ------------------------------------------------------------------------------------


def _check(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], key_mask: Tensor | None,
    scale: float, shared_by: int = 1, causal: bool = False, arithmetic: str = "fp32", window: int | None = None,
) -> None:  # fmt: skip
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"{OP}: arithmetic must be fp32 or bf16 (got {arithmetic!r})")
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale must be finite (got {scale})")
    checks.shape(OP, "q", q, (None, None, None))
    if shared_by < 1:
        raise ValueError(f"{OP}: shared_by must be at least 1 (got {shared_by})")
    batch, queries, channels = q.shape
    if channels % shared_by:
        raise ValueError(f"{OP}: q must have a multiple of shared_by, {shared_by}, channels (got {channels})")
    channels //= shared_by
    checks.shape(OP, "k", k, (batch, None, channels))
    checks.shape(OP, "v", v, (batch, k.shape[1], None))
    if causal and queries > k.shape[1]:
        raise ValueError(f"{OP}: causal needs as many keys as queries at least (got {k.shape[1]} and {queries})")
    if window is not None and window < 0:
        raise ValueError(f"{OP}: window must not be negative (got {window})")
    if window is not None and (causal or queries != k.shape[1]):
        raise ValueError(
            f"{OP}: a window needs as many keys as queries, and causal False (got {k.shape[1]}, {queries}, {causal})"
        )
    checks.floating(OP, "q", q)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} must be {q.dtype} like q (got {tensor.dtype})")
    checks.same_device(OP, "q", q.device, k=k, v=v, key_mask=key_mask)
    if len(qk_first) != len(v_first):
        raise ValueError(
            f"{OP}: v_first must have {len(qk_first)} entries like qk_first, heads + 1 (got {len(v_first)})"
        )
    for name, first, size in (("qk_first", qk_first, channels), ("v_first", v_first, v.shape[2])):
        if (
            not first
            or first[0] != 0
            or first[-1] != size
            or any(a > b for a, b in zip(first, first[1:], strict=False))
        ):
            raise ValueError(f"{OP}: {name} must ascend from 0 to {size}, the channels there are (got {list(first)})")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{OP}: key_mask must be bool (got {key_mask.dtype})")
        checks.shape(OP, "key_mask", key_mask, (batch, k.shape[1]))


def _run(
    run: Callable[..., None], q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int],
    key_mask: Tensor | None, scale: float, shared_by: int, causal: bool, arithmetic: str,
    window: int | None,
) -> Tensor:  # fmt: skip
    """The C++ kernel on float32 tensors of the CPU."""
    q, k, v = (t if t.stride(2) == 1 and not t.is_neg() else t.resolve_neg().contiguous() for t in (q, k, v))
    (batch, queries, _), keys, width = q.shape, k.shape[1], shared_by * v_first[-1]
    y = q.new_empty(batch, queries, width)
    mask_address = mask_stride = 0
    if key_mask is not None:
        key_mask = key_mask if key_mask.stride(1) == 1 else key_mask.contiguous()
        mask_address, mask_stride = key_mask.data_ptr(), key_mask.stride(0)
    run(
        batch, queries, keys, qk_first, v_first, q.data_ptr(), q.stride()[:2], k.data_ptr(), k.stride()[:2],
        v.data_ptr(), v.stride()[:2], y.data_ptr(), (queries * width, width), mask_address, mask_stride, scale,
        calls.threads(), shared_by, causal, arithmetic,
        -1 if window is None else window,
    )  # fmt: skip
    return y


# --- registration -----------------------------------------------------------------------------------------------

_SCHEMA = (
    "compact_attention(Tensor q, Tensor k, Tensor v, int[] qk_first, int[] v_first, Tensor? key_mask, float scale, "
    'int shared_by=1, bool causal=False, str arithmetic="fp32", int? window=None) -> Tensor'
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], key_mask: Tensor | None,
    scale: float, shared_by: int = 1, causal: bool = False, arithmetic: str = "fp32", window: int | None = None,
) -> Tensor:  # fmt: skip
    _check(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, arithmetic, window)
    rest = (qk_first, v_first, key_mask, scale, shared_by, causal)
    if not q.is_cpu or q.dtype == torch.float64 or _RUN is None:
        return compact_attention_reference(q, k, v, *rest, window)
    if q.dtype is _f32:
        return _run(_RUN, q, k, v, *rest, arithmetic, window)
    return _run(_RUN, q.float(), k.float(), v.float(), *rest, arithmetic, window).to(q.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], key_mask: Tensor | None,
    scale: float, shared_by: int = 1, causal: bool = False, arithmetic: str = "fp32", window: int | None = None,
) -> Tensor:  # fmt: skip
    _check(q, k, v, qk_first, v_first, key_mask, scale, shared_by, causal, arithmetic, window)
    return q.new_empty(*q.shape[:-1], shared_by * v.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.qk_first, ctx.v_first, key_mask, ctx.scale, ctx.shared_by, ctx.causal, _, ctx.window = inputs
    ctx.save_for_backward(q, k, v, key_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad: [batch, queries, shared_by D]. Weights are computed again instead of kept."""
    q, k, v, key_mask = ctx.saved_tensors
    dtypes, dtype = (q.dtype, k.dtype, v.dtype), checks.compute_dtype(q, k, v)
    grad = grad.to(dtype)
    q, k, v, key_mask = _readable(q, k, v, key_mask, dtype)
    may_read, at = _may_read(q, k, key_mask, ctx.causal, ctx.window), 0
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with checks.without_autocast(q.device):
        for a, b, c in _heads(ctx.qk_first, ctx.v_first, ctx.shared_by):
            p, g = _weights(q[..., a], k[..., b], may_read, ctx.scale), grad[..., at : at + c.stop - c.start]
            at += c.stop - c.start
            d_p = g @ v[..., c].transpose(1, 2)  # [batch, queries, keys]
            d_logits = ctx.scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
            d_q[..., a] = d_logits @ k[..., b]
            d_k[..., b] += d_logits.transpose(1, 2) @ q[..., a]
            d_v[..., c] += p.transpose(1, 2) @ g
    grads = (t.to(dtype) for t, dtype in zip((d_q, d_k, d_v), dtypes, strict=True))
    return (*grads, None, None, None, None, None, None, None, None)


def _flops(q: Shape, k: Shape, v: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    """Of all logits and all weighted values, forbidden ones too, as PyTorch counts its own attention."""
    return 2 * q[0] * q[1] * k[1] * (q[2] + out_shape[2])


register(_SCHEMA, _forward, flops=_flops, fake=_fake, backward=_backward, setup_context=_setup_context)
