"""`prunekern::dora_gain`: the factor each output channel is multiplied with, from the factored row norm.

    inv_norm = 1 / ||V + s B A||_row        gain = m_b * m * inv_norm

Equation of DoRA (Liu et al. 2024) with a channel mask m_b on the magnitude (Ali et al., ASP-DAC 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prunekern import kernels

from . import checks
from .flops import Shape, count, of_nothing
from .registering import register
from .seen import still_holds
from .thin import thin


def row_sqnorm(V: Tensor) -> Tensor:
    """|V|^2 of each row. V [N, K] -> [N], fp32 (float64 for float64). TypeError or ValueError for another V."""
    checks.tensors("row_sqnorm", {"V": V}, {})
    checks.shape("row_sqnorm", "V", V, (None, None))
    checks.floating("row_sqnorm", "V", V)
    V = V.detach().to(checks.compute_dtype(V))
    with checks.without_autocast(V.device):
        return torch.einsum("nk,nk->n", V, V)


def dora_gain_reference(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: forms V + s B A and takes its row norm. `v_sqnorm` is not read. Differentiable in all."""
    dtype = checks.compute_dtype(V, A, B)
    merged = V.to(dtype) + s * (B.to(dtype) @ A.to(dtype))  # [N, K]
    sqnorm = merged.square().sum(1)
    inv_norm = torch.where(sqnorm > 0, sqnorm.clamp_min(torch.finfo(dtype).tiny).rsqrt(), 0.0)
    gain = m.to(dtype) * inv_norm
    return (gain if m_b is None else m_b.to(dtype) * gain), inv_norm


def factored_inv_norm(V: Tensor, A: Tensor, B: Tensor, s: float, v_sqnorm: Tensor) -> Tensor:
    """1 / ||V + s B A|| by rows, as |V|^2 + 2 s <V, BA> + s^2 |BA|^2: B A [N, K] is never formed.

    With U = V A^T [N, r] and G = A A^T [r, r] this reads V once and costs 2 N K r + 2 K r^2 + 2 N r^2 operations.
    """
    A = A.to(checks.compute_dtype(V, A, B))
    with checks.without_autocast(V.device):
        return _inv_norm(thin(V.to(A.dtype), A), A, B.to(A.dtype), s, v_sqnorm.to(A.dtype))


def _inv_norm(U: Tensor, A: Tensor, B: Tensor, s: float, v_sqnorm: Tensor) -> Tensor:
    G = A @ A.T  # [r, r]
    sqnorm = v_sqnorm + ((2 * s) * U + (s * s) * (B @ G)).mul(B).sum(1)
    # Rounding can push a row that cancels below zero; an all-zero row has inv_norm 0, not inf.
    positive = sqnorm > 0
    return torch.where(positive, torch.where(positive, sqnorm, 1.0).rsqrt(), 0.0)


ROWS = 256  # of a 16-bit V that are widened at once: 0.8 MB at 768 columns
_SCHEMA = "(Tensor V, Tensor A, Tensor B, Tensor m, Tensor? m_b, float s, Tensor v_sqnorm) -> (Tensor, Tensor)"


def _compute(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    if V.is_cpu and V.itemsize == 2:  # no copy of all of it in fp32
        wide = A.to(checks.compute_dtype(A, B))
        U = V.new_empty(A.shape[0], V.shape[0], dtype=wide.dtype).T  # [N, r]
        with checks.without_autocast(V.device):
            for rows, part in zip(V.split(ROWS), U.split(ROWS), strict=True):
                part.copy_(thin(rows.to(wide.dtype), wide))
            inv_norm = _inv_norm(U, wide, B.to(wide.dtype), s, v_sqnorm.to(wide.dtype))
    else:
        inv_norm = factored_inv_norm(V, A, B, s, v_sqnorm)
    gain = m.to(inv_norm.dtype) * inv_norm
    if m_b is not None:
        gain = gain * m_b.to(inv_norm.dtype)
    return gain, inv_norm


def _check(V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, v_sqnorm: Tensor) -> None:
    op = "dora_gain"
    checks.shape(op, "V", V, (None, None))
    (N, K), r = V.shape, A.shape[0] if A.dim() else None
    checks.shape(op, "A", A, (r, K))
    checks.shape(op, "B", B, (N, r))
    for name, tensor in (("m", m), ("m_b", m_b), ("v_sqnorm", v_sqnorm)):
        if tensor is not None:
            checks.shape(op, name, tensor, (N,))
    for name, tensor in (("V", V), ("A", A), ("B", B), ("m", m), ("v_sqnorm", v_sqnorm)):
        checks.floating(op, name, tensor)
    if m_b is not None and m_b.dtype != torch.bool:
        checks.floating(op, "m_b", m_b)
    checks.same_device(op, "V", V.device, A=A, B=B, m=m, m_b=m_b, v_sqnorm=v_sqnorm)


def _fake(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = checks.compute_dtype(V, A, B)
    return V.new_empty(V.shape[0], dtype=dtype), V.new_empty(V.shape[0], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    m, m_b = inputs[3:5]
    ctx.save_for_backward(m, m_b, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_gain: Tensor, _d_inv_norm: Tensor | None) -> tuple[Tensor | None, ...]:
    m, m_b, inv_norm = ctx.saved_tensors
    scaled = d_gain * inv_norm
    d_m = d_mb = None
    if ctx.needs_input_grad[3]:
        d_m = (scaled if m_b is None else scaled * m_b).to(m.dtype)
    if ctx.needs_input_grad[4]:
        d_mb = (scaled * m).to(m_b.dtype)
    return None, None, None, d_m, d_mb, None, None


def _flops(V: Shape, A: Shape, B: Shape, *rest: Any, **kwargs: Any) -> int:
    """U = V A^T, G = A A^T and B G."""
    (N, K), r = V, A[0]
    return 2 * N * K * r + 2 * r * K * r + 2 * N * r * r


_forward = register(
    "dora_gain_forward" + _SCHEMA, _compute, flops=_flops, fake=_fake, backward=_backward, setup_context=_setup_context
)


def _cached(V: Tensor, A: Tensor, B: Tensor, s: float, inv_norm: Tensor, seen: list[int]) -> Tensor:
    """inv_norm where the `Seen` of these numbers still hold V, A and B, else the norm of what they are now."""
    if all(still_holds(number, t) for number, t in zip(seen, (V, A, B), strict=True)):
        return inv_norm.clone()
    return factored_inv_norm(V, A, B, s, row_sqnorm(V)).to(inv_norm.dtype)


def _fake_cached(V: Tensor, A: Tensor, B: Tensor, s: float, inv_norm: Tensor, seen: list[int]) -> Tensor:
    return torch.empty_like(inv_norm)


# What compiled modules call: a graph cannot guard on the values of tensors, so it asks when it runs.
register(
    "_inv_norm_cached(Tensor V, Tensor A, Tensor B, float s, Tensor inv_norm, int[] seen) -> Tensor",
    _cached,
    flops=of_nothing,  # where nothing was written to, nothing is computed
    fake=_fake_cached,
)


@functools.cache
def triton_op() -> Callable[..., tuple[Tensor, Tensor]]:
    """`prunekern::dora_gain_triton`, registered when first asked for."""
    from ..kernels.dora_gain import dora_gain as launch

    def dora_gain_triton(
        V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
    ) -> tuple[Tensor, Tensor]:
        return launch(V, A, B, m, m_b, s, v_sqnorm)

    name = "prunekern::dora_gain_triton"
    op = torch.library.triton_op(name, dora_gain_triton, mutates_args=())
    torch.library.register_autograd(name, _backward, setup_context=_setup_context)
    count("dora_gain_triton", _flops)
    return op


kernels.register_early(triton_op)


def _dora_gain(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    _check(V, A, B, m, m_b, v_sqnorm)
    usable = kernels.usable(V, A, B, m, m_b, rank=A.shape[0])
    pair: tuple[Tensor, Tensor] = (triton_op() if usable else _forward)(V, A, B, m, m_b, s, v_sqnorm)
    return pair


register("dora_gain" + _SCHEMA, _dora_gain, flops=_flops, key="CompositeImplicitAutograd")


def dora_gain(
    V: Tensor, A: Tensor, B: Tensor, m: Tensor, m_b: Tensor | None, s: float, v_sqnorm: Tensor
) -> tuple[Tensor, Tensor]:
    """Gain and inverse row norm of a masked DoRA layer.

    V [N, K], A [r, K], B [N, r]: float64, float32, bfloat16 or float16; m [N] magnitude; m_b [N] binary mask or
    None (all kept); s scale; v_sqnorm [N] cached |V|^2 by rows (`row_sqnorm`). Returns gain [N] and inv_norm [N],
    fp32 (float64 for float64 inputs; on GPUs, with a 16-bit V, A and B are rounded to its dtype for the product, as
    `dora_linear` rounds them). Gradients flow to m and m_b only: the norm is detached (DoRA, section 4.3).
    An all-zero row has inv_norm 0. ValueError / TypeError on shapes, dtypes or devices that do not fit.
    """
    checks.tensors("dora_gain", {"V": V, "A": A, "B": B, "m": m, "v_sqnorm": v_sqnorm}, {"m_b": m_b})
    pair: tuple[Tensor, Tensor] = torch.ops.prunekern.dora_gain(V, A, B, m, m_b, s, v_sqnorm)
    return pair
