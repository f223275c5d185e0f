"""What the ops are by definition, in float64; an error for what is no legal call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def legal(condition: object, what: str) -> None:
    if not condition:
        raise ValueError(f"no legal call: {what}")


def plain(t: Any, *shape: int | None) -> Tensor:
    """A floating-point tensor of the CPU of that shape (None: any size), as float64."""
    legal(isinstance(t, Tensor) and t.device.type == "cpu", "tensor")
    legal(t.dtype in FLOATS and t.dim() == len(shape), "dtype or dimensions")
    legal(all(want is None or got == want for got, want in zip(t.shape, shape, strict=True)), "shape")
    return t.detach().to_dense().double()


def rows(x: Any, width: int | None = None) -> Tensor:
    legal(isinstance(x, Tensor) and x.dim() >= 1, "rows")
    return plain(x, *[None] * (x.dim() - 1), width)


def index(i: Any, count: int, size: int) -> Tensor:
    """Sorted int64 places below size; all of them for None."""
    if i is None:
        legal(count == size, "no index where one is needed")
        return torch.arange(size)
    legal(isinstance(i, Tensor) and i.dtype is torch.int64 and i.device.type == "cpu", "index")
    legal(i.layout is torch.strided and i.shape == (count,), "index")
    places = i.tolist()
    legal(places == sorted(set(places)) and all(0 <= p < size for p in places), "index")
    return i


def activation(z: Tensor, name: Any) -> Tensor:
    functions = {
        "none": lambda z: z,
        "relu": torch.relu,
        "gelu": lambda z: z * 0.5 * torch.erfc(-z / 2**0.5),
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    }
    legal(isinstance(name, str) and name in functions, "activation")
    return functions[name](z)


def scatter(a: Tensor, out_index: Any, n_out: Any, residual: Any) -> Tensor:
    legal(isinstance(n_out, int) and not isinstance(n_out, bool) and n_out >= 0, "n_out")
    y = a.new_zeros(*a.shape[:-1], n_out)
    y[..., index(out_index, a.shape[-1], n_out)] = a
    if residual is not None:
        y = y + plain(residual, *y.shape)
    return y


_activated = activation  # `linear` has an argument of that name


def linear(
    x: Any,
    packed: Any,
    bias: Any = None,
    in_index: Any = None,
    out_index: Any = None,
    n_out: Any = None,
    activation: str = "none",
    residual: Any = None,
    scale: Any = None,
) -> Tensor:
    """`compact_linear`; the weight is not packed."""
    weight = plain(packed, None, None)
    read, kept = rows(x), weight.shape[0]
    legal(scale is None, "scale")
    z = read[..., index(in_index, weight.shape[1], read.shape[-1])] @ weight.T
    if bias is not None:
        z = z + plain(bias, kept)
    return scatter(_activated(z, activation), out_index, kept if n_out is None else n_out, residual)


def mlp(**given: Any) -> Tensor:
    """`compact_mlp` of plain weights."""
    x, up, down = rows(given["x"]), plain(given["up"], None, None), plain(given["down"], None, None)
    hidden = up.shape[0] if given["n_hidden"] is None else given["n_hidden"]
    legal(isinstance(hidden, int) and not isinstance(hidden, bool) and up.shape[0] == hidden == down.shape[1], "hidden")
    z = x[..., index(given["in_index"], up.shape[1], x.shape[-1])] @ up.T
    if given["up_bias"] is not None:
        z = z + plain(given["up_bias"], hidden)
    a = activation(z, given["activation"]) @ down.T
    if given["down_bias"] is not None:
        a = a + plain(given["down_bias"], down.shape[0])
    n_out = down.shape[0] if given["n_out"] is None else given["n_out"]
    return scatter(a, given["out_index"], n_out, given["residual"])


def attention(**given: Any) -> Tensor:
    """`compact_attention` without groups or cause."""
    q, k, v = (plain(given[name], None, None, None) for name in "qkv")
    legal(q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1] == v.shape[1] and q.shape[2] == k.shape[2], "shapes")
    firsts = []
    for name, width in (("qk_first", k.shape[2]), ("v_first", v.shape[2])):
        first = given[name]
        legal(isinstance(first, list | tuple) and all(isinstance(f, int) for f in first), "heads")
        legal(len(first) > 0 and first[0] == 0 and first[-1] == width and list(first) == sorted(first), "heads")
        firsts.append(first)
    legal(len(firsts[0]) == len(firsts[1]), "heads")
    legal(isinstance(given["scale"], int | float) and not isinstance(given["scale"], bool), "scale")
    mask = given["key_mask"]
    may = torch.ones(k.shape[:2], dtype=torch.bool)
    if mask is not None:
        legal(isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == k.shape[:2], "mask")
        legal(mask.layout is torch.strided and mask.device.type == "cpu", "mask")
        may = mask
    y = q.new_zeros(*q.shape[:2], v.shape[2])
    for h in range(len(firsts[0]) - 1):
        a, b = (slice(f[h], f[h + 1]) for f in firsts)
        s = float(given["scale"]) * q[..., a] @ k[..., a].transpose(1, 2)
        p = s.masked_fill(~may[:, None], float("-inf")).softmax(-1) if may.numel() else s
        p = p.masked_fill(~may.any(1)[:, None, None], 0.0)
        y[..., b] = p @ v[..., b].masked_fill(~may[..., None], 0.0)
    return y


def gain(**given: Any) -> Tensor:
    """The first of what `dora_gain` returns."""
    V = plain(given["V"], None, None)
    n, k = V.shape
    A = plain(given["A"], None, k)
    B = plain(given["B"], n, A.shape[0])
    legal(isinstance(given["s"], int | float), "s")
    plain(given["v_sqnorm"], n)
    norm = (V + float(given["s"]) * B @ A).norm(dim=1)
    m_b = torch.ones(n).double() if given["m_b"] is None else given["m_b"]
    if isinstance(m_b, Tensor) and not m_b.is_complex():  # zeros and ones are what they are of any dtype
        m_b = m_b.double()
    m_b = plain(m_b, n)
    return torch.where(norm > 0, m_b * plain(given["m"], n) / norm, 0.0)


def dora(**given: Any) -> Tensor:
    """`dora_linear`."""
    V = plain(given["V"], None, None)
    x = rows(given["x"], V.shape[1])
    A = plain(given["A"], None, V.shape[1])
    B = plain(given["B"], V.shape[0], A.shape[0])
    legal(isinstance(given["s"], int | float), "s")
    low = x if given["x_lora"] is None else plain(given["x_lora"], *x.shape)
    y = plain(given["gain"], V.shape[0]) * (x @ V.T + float(given["s"]) * (low @ A.T) @ B.T)
    return y if given["bias"] is None else y + plain(given["bias"], V.shape[0])


def merge(**given: Any) -> Tensor:
    """`dora_merge`."""
    V = plain(given["V"], None, None)
    A = plain(given["A"], None, V.shape[1])
    B = plain(given["B"], V.shape[0], A.shape[0])
    legal(isinstance(given["s"], int | float), "s")
    W = plain(given["gain"], V.shape[0])[:, None] * (V + float(given["s"]) * B @ A)
    for dim, name in enumerate(("rows", "cols")):
        kept = given[name]
        if kept is not None:
            legal(isinstance(kept, Tensor) and kept.dim() == 1, name)
            W = W.index_select(dim, index(kept, len(kept), W.shape[dim]))
    return W


def norm(**given: Any) -> Tensor:
    """`rms_norm`."""
    x = rows(given["x"])
    weight, eps = plain(given["weight"], x.shape[-1]), given["eps"]
    legal(isinstance(eps, int | float), "eps")
    return weight * x * (x.square().mean(-1, keepdim=True) + float(eps)).rsqrt()


def is_right(got: Any, want: Tensor) -> bool:
    """Whether it is that answer, to the rounding of its dtype and of 16-bit inputs; NaN and infinities where they are
    in the answer.
    """
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return False
    # Of 16 bits rounded at the end; inputs of 16 bits are what they are, and summed in fp32.
    close = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(got.dtype, 1e-4)
    got = got.detach().double()
    finite = want.isfinite()
    if not finite.all():  # what NaN does to sums of other orders is not promised: where the answer is finite, it is
        return bool(((got - want).abs()[finite] <= close * (1 + want[finite].abs())).all())
    size = 1 + want.abs().max().item() if want.numel() else 1.0
    return bool(((got - want).abs() <= close * size).all())
