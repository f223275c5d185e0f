"""What bench/gpu/tune.py tunes: each kernel of the promises on inputs of its sizes, and the block sizes to try."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.gpu.timing import sets_for
from prunekern import ops
from prunekern.kernels import compact_finish, dora_gain
from prunekern.kernels import dora_linear as dora_kernels

SCALE = 2.0
MOST = 40  # candidates of a subject: compiling is what takes the time
Calls = list[Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Subject:
    """kernel: as in configs.json. size: what its entries go by (rank or rows). calls: on sets of inputs, each returning
    what is checked; want: the first one's answer. grid: values of each entry of a candidate.
    """

    kernel: str
    size: int
    make: Callable[[torch.device, torch.dtype], tuple[Calls, torch.Tensor]]
    grid: dict[str, tuple[int, ...]]
    bound: float = 1e-2  # largest relative error of an answer: without a part of it, it would be larger

    def candidates(self) -> list[dict[str, int]]:
        """At most MOST that may fit, spread over the grid, the same ones every time."""
        every = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        some = [entry for entry in every if may_fit(entry)]
        return random.Random(0).sample(some, MOST) if len(some) > MOST else some


def may_fit(entry: dict[str, int]) -> bool:
    """By an H100's shared memory (227 KiB a block) and registers (65,536 a block, 255 a thread), for 16-bit operands;
    what the kernel needs besides tiles and accumulator is not counted.
    """
    rows, columns = entry.get("BLOCK_M") or entry.get("BLOCK_T") or entry["BLOCK_N"], entry["BLOCK_N"]
    depth, stages = entry.get("BLOCK_K", 0), max(entry.get("STAGES", 1), entry.get("num_stages", 1))
    product = "BLOCK_M" in entry and depth
    tiles = (rows + columns) * depth if product else rows * (depth or columns)  # the norm has one large operand, V
    registers = rows * (columns if product or not depth else depth // 2) // (32 * entry["num_warps"])
    return 2 * stages * tiles <= 227 * 1024 and registers <= 160


def gain(N: int, K: int, r: int, as_it_is: int = dora_gain.AS_IT_IS):
    """as_it_is: largest rank whose A is not cast."""

    def make(device, dtype):
        V = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(sets_for(2 * N * K, device))]
        A, B = torch.randn(r, K, device=device) / K**0.5, torch.randn(N, r, device=device)
        m, m_b = torch.rand(N, device=device) + 0.5, (torch.rand(N, device=device) > 0.3).float()
        sqnorm = ops.row_sqnorm(V[0])
        W = V[0].double() + SCALE * (B.to(dtype).double() @ A.to(dtype).double())

        def call(v):
            kept, dora_gain.AS_IT_IS = dora_gain.AS_IT_IS, as_it_is
            try:
                return ops.dora_gain(v, A, B, m, m_b, SCALE, sqnorm)[0]
            finally:
                dora_gain.AS_IT_IS = kept

        return [lambda v=v: call(v) for v in V], m_b * m / W.square().sum(1).sqrt()

    return make


def composed(N: int, T: int, r: int):
    """What follows the vendor's product in the forward pass."""

    def make(device, dtype):
        zs = [torch.randn(T, N, device=device, dtype=dtype) for _ in range(sets_for(2 * T * N, device))]
        p, B = torch.randn(T, r, device=device, dtype=dtype), torch.randn(N, r, device=device, dtype=dtype)
        factor, y = torch.rand(N, device=device), torch.empty_like(zs[0])
        want = factor * (zs[0].double() + SCALE * p.double() @ B.double().T)

        def call(z):
            if device.type != "cuda":
                return factor * (z + SCALE * p @ B.T)
            dora_kernels.compose(z, p, B, factor, None, SCALE, True, y)
            return y

        return [lambda z=z: call(z) for z in zs], want

    return make


def backward(N: int, T: int, r: int):
    def make(device, dtype):
        dys = [torch.randn(T, N, device=device, dtype=dtype) for _ in range(2)]
        z, p = torch.randn(T, N, device=device, dtype=dtype), torch.randn(T, r, device=device, dtype=dtype)
        B, factor = torch.randn(N, r, device=device, dtype=dtype), torch.rand(N, device=device)

        def call(dy):
            if device.type != "cuda":
                return dy * factor.to(dtype), (dy * z).sum(0)
            return dora_kernels.backward(dy, z, p, B, factor, None, SCALE, r <= 64, True, True, False, False)[:2]

        return [lambda dy=dy: call(dy) for dy in dys], (dys[0].double() * factor, (dys[0].double() * z).sum(0))

    return make


def linear(n_out: int, n_in: int, rows: int, share: float = 0.25):
    def make(device, dtype):
        generator = torch.Generator().manual_seed(0)
        out = torch.randperm(n_out, generator=generator)[: round(n_out * (1 - share))].sort().values.to(device)
        N, K = out.numel(), round(n_in * (1 - share))
        Ws = [torch.randn(N, K, device=device, dtype=dtype) / K**0.5 for _ in range(sets_for(2 * N * K, device))]
        x = torch.randn(rows, K, device=device, dtype=dtype)
        residual = torch.randn(rows, n_out, device=device, dtype=dtype)
        want = residual.double()
        want[:, out] += x.double() @ Ws[0].double().T

        def call(w):
            kept, compact_finish.VENDOR_ROWS = compact_finish.VENDOR_ROWS, 10**9  # our product is what is tuned
            try:
                return ops.compact_linear(x, w, None, None, out, n_out, "none", residual)
            finally:
                compact_finish.VENDOR_ROWS = kept

        return [lambda w=w: call(w) for w in Ws], want

    return make


def finish(n_out: int, rows: int, share: float = 0.25):
    """What follows the vendor's product, scattered, with a residual."""

    def make(device, dtype):
        generator = torch.Generator().manual_seed(0)
        out = torch.randperm(n_out, generator=generator)[: round(n_out * (1 - share))].sort().values.to(device)
        count = sets_for(2 * rows * n_out, device)
        zs = [torch.randn(rows, out.numel(), device=device, dtype=dtype) for _ in range(count)]
        residual = torch.randn(rows, n_out, device=device, dtype=dtype)
        want = residual.double()
        want[:, out] += zs[0].double()

        def call(z):
            if device.type != "cuda":
                return residual.index_add(1, out, z)
            return compact_finish.compact_finish(z, None, out, n_out, "none", residual)

        return [lambda z=z: call(z) for z in zs], want

    return make


def gated(H: int, K: int, rows: int):
    def make(device, dtype):
        sets = [
            [torch.randn(H, K, device=device, dtype=dtype) / K**0.5 for _ in range(2)]
            for _ in range(sets_for(4 * H * K, device))
        ]
        x = torch.randn(rows, K, device=device, dtype=dtype)
        up, gate = (x.double() @ w.double().T for w in sets[0])

        def call(u, g):
            if device.type != "cuda":
                return torch.nn.functional.silu(x @ g.T) * (x @ u.T)
            from prunekern.kernels.compact_mlp import compact_gated

            kept, compact_finish.VENDOR_ROWS = compact_finish.VENDOR_ROWS, 10**9
            try:
                return compact_gated(x, u, g, None, None, None, None, None, "silu")
            finally:
                compact_finish.VENDOR_ROWS = kept

        return [lambda u=u, g=g: call(u, g) for u, g in sets], torch.nn.functional.silu(gate) * up

    return make


TILES = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}
ROWS = {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128), "GROUP": (8,)}
FEW = {"BLOCK_M": (16,), "BLOCK_N": (16, 32, 64), "BLOCK_K": (64, 128, 256), "GROUP": (1,)}


def subjects(small: bool) -> dict[str, Subject]:
    """By name. small: sizes for a CPU."""
    N, K, T = (64, 48, 32) if small else (4096, 4096, 8192)
    ffn = 96 if small else 11008
    stages = {"num_stages": (2, 3, 4, 5)}
    found = {}
    for r in (4,) if small else (16, 64):
        norm = {"BLOCK_N": (64, 128, 256), "BLOCK_K": (32, 64, 128), "STAGES": (2, 3, 4, 5), "num_warps": (4, 8)}
        norm["num_stages"] = (3,)
        found[f"gain-{r}"] = Subject("dora_gain" if small else "dora_gain_factored", r, gain(N, K, r), norm, 1e-4)
        pass_ = {"BLOCK_T": (16, 32, 64, 128), "BLOCK_N": (64, 128, 256), "STAGES": (1, 2, 3, 4)}
        pass_ |= {"num_warps": (4, 8), "num_stages": (2,)}
        found[f"compose-{r}"] = Subject("dora_compose", r, composed(N, T, r), pass_)
        found[f"backward-{r}"] = Subject("dora_backward", r, backward(N, T, r), pass_)
    if not small:
        norm = {"BLOCK_N": (64, 128, 256), "BLOCK_K": (64, 128), "BLOCK_R": (32, 64, 128), "STAGES": (1,)}
        found["gain-64-uncast"] = Subject("dora_gain_factored", 64, gain(N, K, 64, 64), found["gain-64"].grid, 1e-4)
        found["gain-384"] = Subject("dora_gain", 384, gain(N, K, 384), {**norm, **TILES}, 1e-4)
    for rows in (8,) if small else (16, 1024, 8192):
        grid = {**(FEW if rows <= 16 else ROWS), "num_warps": (4, 8), **stages}
        found[f"linear-{rows}"] = Subject("compact_linear", rows, linear(N, ffn, rows), grid)
        found[f"gated-{rows}"] = Subject("compact_gated", rows, gated(ffn, K, rows), grid)
    pass_ = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (64, 128, 256, 512), "STAGES": (1, 2, 3), "num_warps": (2, 4, 8)}
    found["finish"] = Subject("compact_finish", T, finish(N, T), {**pass_, "num_stages": (2,)})
    return found
