"""disentangled_attention: attention by content and by relative position, on heads of different widths (DeBERTa)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekern import _native

from . import calls, checks
from .compact_attention import ARITHMETIC
from .flops import Shape
from .registering import register

OP = "disentangled_attention"
# The whole call in one C function (csrc/python/disentangled.cpp), which gives None for a call that it leaves to the op;
# None without the core or with torch < 2.10.
_EAGER: Callable[..., Tensor | None] | None = (
    getattr(_native.core(), "call_disentangled", None) if calls.EAGER else None
)
_f32 = torch.float32


def disentangled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_first: Sequence[int],
    v_first: Sequence[int],
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    token_mask: Tensor | None = None,
    scale: float = 1.0,
    arithmetic: str = "fp32",
) -> Tensor:
    """y_h = softmax(scale logits_h) v_h for every sequence and head h, over the keys that token_mask allows, with

        logits[i, j] = q_i . k_j + q_i . pos_key[i - j] + k_j . pos_query[i - j]

    Schema: `prunekern::disentangled_attention(Tensor q, Tensor k, Tensor v, int[] qk_first, int[] v_first,
    Tensor? pos_key, Tensor? pos_query, Tensor? token_mask, float scale, str arithmetic="fp32") -> Tensor`.

    Args:
        q: [batch, tokens, C], any strides; float64 computes in float64, float32, bfloat16 and float16 in float32.
        k: [batch, tokens, C].
        v: [batch, tokens, D].
        qk_first: heads + 1 ints, ascending from 0 to C: head h has channels qk_first[h] to qk_first[h + 1] of queries,
            keys and positions. A head without any averages its values over the allowed keys.
        v_first: heads + 1 ints, ascending from 0 to D: the same for values.
        pos_key: [2 tokens - 1, C]: row tokens - 1 + i - j is the key of a token i - j places before the query; None:
            queries meet no positions.
        pos_query: the same, of the queries that keys meet.
        token_mask: bool [batch, tokens], True for tokens, False for padding; None: all are. Keys that are none are not
            read; a query that is none averages all values, those of padding, too: what a softmax makes of a row of
            logits that are all the lowest number. So padding must be finite.
        scale: of the logits.
        arithmetic: as in `compact_attention`.

    Returns y [batch, tokens, D] in the dtype of q. On the CPU, in float32 (and in 16 bits, by way of it) and where no
    gradient is needed, the C++ kernel runs; anything else runs the PyTorch reference. Differentiable in q, k, v and
    both positions. Raises ValueError (shapes, devices) or TypeError (dtypes), naming the argument.

    Source: DeBERTa (He et al., ICLR 2021), equation 4: a matrix of relative positions has the same row all along each
    of its diagonals, so that nothing is gathered.
    """
    if _EAGER and calls.short() and not calls.needs_grad(q, k, v, pos_key, pos_query):
        number = ARITHMETIC.get(arithmetic, -1) if type(arithmetic) is str else -1
        y = _EAGER(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, calls.threads(), number)
        if y is not None:
            return y
    optional = {"pos_key": pos_key, "pos_query": pos_query, "token_mask": token_mask}
    checks.tensors(OP, {"q": q, "k": k, "v": v}, optional)
    if calls.transformed():
        _check(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, arithmetic)
        return disentangled_attention_reference(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale)
    read: Tensor = torch.ops.prunekern.disentangled_attention(
        q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, arithmetic
    )
    return read


def disentangled_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qk_first: Sequence[int],
    v_first: Sequence[int],
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    token_mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same in plain PyTorch, head by head; differentiable; never calls the C++ core."""
    dtype, out = checks.compute_dtype(q, k, v), q.dtype  # 16 bits never meet a matmul
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    pos_key, pos_query = (None if t is None else t.to(dtype) for t in (pos_key, pos_query))
    row, forbidden = _rows(q), _forbidden(token_mask)
    with checks.without_autocast(q.device):
        parts = [
            _weights(q[..., a], k[..., a], _part(pos_key, a), _part(pos_query, a), row, forbidden, scale) @ v[..., b]
            for a, b in _heads(qk_first, v_first)  # [batch, tokens, d]
        ]
    y = torch.cat(parts, -1) if parts else q.new_zeros(*q.shape[:-1], 0)
    return y.to(out)


def _heads(qk_first: Sequence[int], v_first: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Query/key and value channels of every head."""
    for a, b, c, d in zip(qk_first, qk_first[1:], v_first, v_first[1:], strict=False):
        yield slice(a, b), slice(c, d)


def _rows(q: Tensor) -> Tensor:
    """int64 [batch, queries, keys]: the row of positions of each pair."""
    place = torch.arange(q.shape[1], device=q.device)
    return (place[:, None] - place + q.shape[1] - 1).expand(len(q), -1, -1)


def _forbidden(token_mask: Tensor | None) -> Tensor | None:
    """bool [batch, queries, keys], True where either is no token; None: none is."""
    return None if token_mask is None else ~(token_mask[:, :, None] & token_mask[:, None])


def _part(positions: Tensor | None, channels: slice) -> Tensor | None:
    return None if positions is None else positions[:, channels]


def _weights(
    q: Tensor, k: Tensor, pos_key: Tensor | None, pos_query: Tensor | None, row: Tensor, forbidden: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention weights of one head, [batch, queries, keys]."""
    logits = q @ k.transpose(1, 2)
    if pos_key is not None:
        logits = logits + (q @ pos_key.T).gather(2, row)
    if pos_query is not None:
        by_key = (k @ pos_query.T).gather(2, row.transpose(1, 2))  # [batch, keys, queries]
        logits = logits + by_key.transpose(1, 2)
    logits = scale * logits
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


# --- checks and the C++ path ------------------------------------------------------------------------------------


def _check(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], pos_key: Tensor | None,
    pos_query: Tensor | None, token_mask: Tensor | None, scale: float, arithmetic: str = "fp32",
) -> None:  # fmt: skip
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"{OP}: arithmetic must be fp32 or bf16 (got {arithmetic!r})")
    if not math.isfinite(scale):
        raise ValueError(f"{OP}: scale must be finite (got {scale})")
    checks.shape(OP, "q", q, (None, None, None))
    batch, tokens, channels = q.shape
    checks.shape(OP, "k", k, (batch, tokens, channels))
    checks.shape(OP, "v", v, (batch, tokens, None))
    checks.floating(OP, "q", q)
    for name, tensor in (("pos_key", pos_key), ("pos_query", pos_query)):
        if tensor is not None:
            checks.shape(OP, name, tensor, (max(2 * tokens - 1, 0), channels))
    for name, tensor in (("k", k), ("v", v), ("pos_key", pos_key), ("pos_query", pos_query)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} must be {q.dtype} like q (got {tensor.dtype})")
    checks.same_device(OP, "q", q.device, k=k, v=v, pos_key=pos_key, pos_query=pos_query, token_mask=token_mask)
    if len(qk_first) != len(v_first):
        raise ValueError(
            f"{OP}: v_first must have {len(qk_first)} entries like qk_first, heads + 1 (got {len(v_first)})"
        )
    for name, first, size in (("qk_first", qk_first, channels), ("v_first", v_first, v.shape[2])):
        descends = any(a > b for a, b in zip(first, first[1:], strict=False))
        if not first or first[0] != 0 or first[-1] != size or descends:
            raise ValueError(f"{OP}: {name} must ascend from 0 to {size}, the channels there are (got {list(first)})")
    if token_mask is not None:
        if token_mask.dtype != torch.bool:
            raise TypeError(f"{OP}: token_mask must be bool (got {token_mask.dtype})")
        checks.shape(OP, "token_mask", token_mask, (batch, tokens))


def _run(
    q: Tensor, k: Tensor, v: Tensor, firsts: tuple[Sequence[int], Sequence[int]],
    positions: tuple[Tensor | None, Tensor | None], token_mask: Tensor | None, scale: float, arithmetic: str,
) -> Tensor | None:  # fmt: skip
    """The C++ kernel, in float32; None where it cannot run."""
    if _EAGER is None:
        return None
    qkv = [_plain(t.detach().float()) for t in (q, k, v)]
    rows = [None if t is None else _plain(t.detach().float()) for t in positions]
    qk_first, v_first = map(tuple, firsts)
    mask = None if token_mask is None else calls.plain_memory(token_mask).detach()
    return _EAGER(*qkv, qk_first, v_first, *rows, mask, scale, calls.threads(), ARITHMETIC[arithmetic])


def _plain(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 and not tensor.is_neg() else calls.plain_memory(tensor)


# --- registration -----------------------------------------------------------------------------------------------

_SCHEMA = (
    "disentangled_attention(Tensor q, Tensor k, Tensor v, int[] qk_first, int[] v_first, Tensor? pos_key, "
    'Tensor? pos_query, Tensor? token_mask, float scale, str arithmetic="fp32") -> Tensor'
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], pos_key: Tensor | None,
    pos_query: Tensor | None, token_mask: Tensor | None, scale: float, arithmetic: str = "fp32",
) -> Tensor:  # fmt: skip
    _check(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, arithmetic)
    y = None
    if q.is_cpu and q.dtype != torch.float64:
        y = _run(q, k, v, (qk_first, v_first), (pos_key, pos_query), token_mask, scale, arithmetic)
    if y is None:
        y = disentangled_attention_reference(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale)
    return y.to(q.dtype)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, qk_first: Sequence[int], v_first: Sequence[int], pos_key: Tensor | None,
    pos_query: Tensor | None, token_mask: Tensor | None, scale: float, arithmetic: str = "fp32",
) -> Tensor:  # fmt: skip
    _check(q, k, v, qk_first, v_first, pos_key, pos_query, token_mask, scale, arithmetic)
    return q.new_empty(*q.shape[:-1], v.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.qk_first, ctx.v_first, pos_key, pos_query, token_mask, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, pos_key, pos_query, token_mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad: [batch, tokens, D]. Weights are computed again instead of kept."""
    *read, token_mask = ctx.saved_tensors
    dtype = checks.compute_dtype(*read[:3])
    grad, q, k, v = (t.to(dtype) for t in (grad, *read[:3]))
    positions = [None if t is None else t.to(dtype) for t in read[3:]]
    row, forbidden = _rows(q), _forbidden(token_mask)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_positions = [None if t is None else torch.zeros_like(t) for t in positions]
    with checks.without_autocast(q.device):
        for a, b in _heads(ctx.qk_first, ctx.v_first):
            own = (q[..., a], k[..., a])
            p = _weights(*own, _part(positions[0], a), _part(positions[1], a), row, forbidden, ctx.scale)
            d_p = grad[..., b] @ v[..., b].transpose(1, 2)  # [batch, queries, keys]
            d_logits = ctx.scale * p * (d_p - (d_p * p).sum(-1, keepdim=True))
            if forbidden is not None:  # padding averages whatever its logits are
                d_logits = d_logits.masked_fill(forbidden, 0.0)
            d_q[..., a] = d_logits @ own[1]
            d_k[..., a] = d_logits.transpose(1, 2) @ own[0]
            d_v[..., b] = p.transpose(1, 2) @ grad[..., b]
            # What was gathered from each side's logits by position is put back.
            sides = ((own[0], d_q, row, d_logits), (own[1], d_k, row.transpose(1, 2), d_logits.transpose(1, 2)))
            for (x, d_x, index, d_pairs), table, d_table in zip(sides, positions, d_positions, strict=True):
                if table is not None and d_table is not None:
                    by_position = q.new_zeros(*row.shape[:2], len(table)).scatter(2, index, d_pairs)
                    d_x[..., a] += by_position @ table[:, a]
                    d_table[:, a] = (by_position.transpose(1, 2) @ x).sum(0)
    found = (d_q, d_k, d_v, *d_positions)
    grads = [None if t is None else t.to(given.dtype) for t, given in zip(found, read, strict=True)]
    return *grads[:3], None, None, *grads[3:], None, None, None


def _flops(
    q: Shape, k: Shape, v: Shape, qk_first: Any, v_first: Any, pos_key: Shape | None, pos_query: Shape | None,
    *rest: Any, out_shape: Shape, **kwargs: Any,
) -> int:  # fmt: skip
    """Of all logits, one product for each of their terms, and all weighted values, forbidden ones too."""
    terms = 1 + (pos_key is not None) + (pos_query is not None)
    return 2 * q[0] * q[1] * k[1] * (terms * q[2] + out_shape[2])


register(_SCHEMA, _forward, flops=_flops, fake=_fake, backward=_backward, setup_context=_setup_context)
