"""What bench.gpu.everything times of single layers: the norm, DoRA layers beside PEFT's, their passes, compact ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

import prunekern as pk
from bench.gpu.timing import median_seconds, peak_memory, sets_for
from prunekern import ops
from prunekern.kernels import compact_finish
from prunekern.kernels import dora_linear as dora_kernels

SHAPES = ((4096, 4096), (11008, 4096))
RANKS = (16, 64, 384)
SCALE = 2.0
Cases = list[Callable[[], dict]]  # one row each, so that one that fails takes no other along


def close(name: str, got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    """SystemExit unless ||got - want|| <= bound ||want||; NaN never passes."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not error <= bound:
        raise SystemExit(f"{name}: wrong answer (relative error {error:.2e}, {bound:.0e} accepted)")


def peft_layer(weight: torch.Tensor, rank: int, dora: bool) -> nn.Module:
    """PEFT's adapter on one linear, all in the weight's dtype."""
    from peft import LoraConfig, get_peft_model

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            self.linear.weight = nn.Parameter(weight)

        def forward(self, x):
            return self.linear(x)

    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["linear"], use_dora=dora)
    layer = get_peft_model(One(), config, autocast_adapter_dtype=False).base_model.model.linear
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_B"):
            nn.init.normal_(parameter, std=0.01)
    return layer


def our_layer(weight: torch.Tensor, rank: int) -> nn.Module:
    mask = pk.nn.ChannelMask(weight.shape[0])
    layer = pk.nn.MaskedDoRALinear(weight.cpu(), rank=rank, alpha=SCALE * rank, mask=mask).to(weight.device)
    nn.init.normal_(layer.B, std=0.01)
    mask.logits.data.normal_()
    return layer


def gain(device, copy_bytes: float, product_flops: float, shapes=SHAPES, ranks=RANKS, dtype=torch.bfloat16) -> Cases:
    """dora_gain against PEFT's norm and the floors: V once at copy bandwidth, its products at the product's rate."""
    return [partial(_gain, device, copy_bytes, product_flops, N, K, r, dtype) for N, K in shapes for r in ranks]


def _gain(device, copy_bytes, product_flops, N, K, r, dtype) -> dict:
    V = [torch.randn(N, K, device=device, dtype=dtype) for _ in range(sets_for(2 * N * K, device))]
    A, B = torch.randn(r, K, device=device) / K**0.5, torch.randn(N, r, device=device)
    m = torch.rand(N, device=device) + 0.5
    m_b = (torch.rand(N, device=device) > 0.3).float()
    sqnorm = ops.row_sqnorm(V[0])
    got, _ = ops.dora_gain(V[0], A, B, m, m_b, SCALE, sqnorm)
    W = V[0].double() + SCALE * (B.to(dtype).double() @ A.to(dtype).double())
    close(f"dora_gain {N} x {K} rank {r}", got, m_b * m / W.square().sum(1).sqrt(), 1e-4)
    peers = [peft_layer(v, r, True) for v in V[:2]]
    calls = {
        "ours": [lambda v=v: ops.dora_gain(v, A, B, m, m_b, SCALE, sqnorm) for v in V],
        "PEFT": [lambda p=p: peft_norm(p) for p in peers],
    }
    seconds = median_seconds(calls, device)
    bytes_floor = (V[0].nbytes + A.nbytes + B.nbytes + 16 * N) / copy_bytes
    return {
        "N x K": f"{N} x {K}",
        "rank": r,
        "us": round(1e6 * seconds["ours"], 1),
        "PEFT_us": round(1e6 * seconds["PEFT"], 1),
        "x_PEFT": round(seconds["PEFT"] / seconds["ours"], 2),
        "of_copy_bandwidth": round(bytes_floor / seconds["ours"], 3),
        "of_arithmetic_floor": round(2 * N * K * r / product_flops / seconds["ours"], 3),
    }


def peft_norm(layer: nn.Module) -> torch.Tensor:
    """What PEFT's DoRA layer does for its norm at every forward pass: B A from an identity matrix, then the norm."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    eye = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    low = b(layer.lora_A["default"](eye)).T
    return layer.lora_magnitude_vector["default"].get_weight_norm(layer.weight, low.detach(), SCALE)


def training(device, shapes=SHAPES, ranks=RANKS, tokens=8192, dtype=torch.bfloat16) -> Cases:
    """Forward and backward of one layer, our norm's refresh included, against PEFT's LoRA and DoRA layers."""
    return [partial(_training, device, N, K, r, tokens, dtype) for N, K in shapes for r in ranks]


def _training(device, N, K, r, tokens, dtype) -> dict:
    weight = torch.randn(N, K, device=device, dtype=dtype) / K**0.5
    layers = {"ours": our_layer(weight, r)} | {n: peft_layer(weight, r, n == "DoRA") for n in ("LoRA", "DoRA")}
    xs = [torch.randn(tokens, K, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    dys = [torch.randn(tokens, N, device=device, dtype=dtype) for _ in range(3)]
    _check_layer(layers["ours"], xs[0], dys[0])
    calls = {
        name: [lambda layer=layer, x=x, dy=dy: _step(layer, x, dy) for x, dy in zip(xs, dys, strict=True)]
        for name, layer in layers.items()
    }
    seconds = median_seconds(calls, device, 0.6, graphed=False)
    memory = {name: peak_memory(some[0], device) for name, some in calls.items()}
    twice = [_gradients(layers["ours"], xs[0], dys[0]) for _ in range(2)]
    return {
        "N x K": f"{N} x {K}",
        "rank": r,
        "ms": round(1e3 * seconds["ours"], 3),
        "LoRA_ms": round(1e3 * seconds["LoRA"], 3),
        "DoRA_ms": round(1e3 * seconds["DoRA"], 3),
        "x_LoRA": round(seconds["ours"] / seconds["LoRA"], 3),
        "faster_than_DoRA": round(seconds["DoRA"] / seconds["ours"], 2),
        "memory_over_LoRA_outputs": round((memory["ours"] - memory["LoRA"]) / (tokens * N * dys[0].itemsize), 2),
        "bitwise_repeatable": all(torch.equal(a, b) for a, b in zip(*twice, strict=True)),
    }


def _gradients(layer, x, dy) -> list[torch.Tensor]:
    _step(layer, x, dy)
    return [p.grad.clone() for p in (x, *layer.parameters()) if p.grad is not None]


def _step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    for parameter in (x, *layer.parameters()):  # added to, they would cost everyone the same on top
        parameter.grad = None
    if isinstance(layer, pk.nn.MaskedDoRALinear):
        layer.refresh()  # once an optimiser step; PEFT takes its norm in the forward pass
    layer(x).backward(dy)


def _check_layer(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> None:
    got = _gradients(layer, x, dy)
    exact = copy.deepcopy(layer).double()
    other = x.detach().double().requires_grad_()
    want = _gradients(exact, other, dy.double())
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        close(f"gradient {i}", a, b, 2e-2)


def passes(device, copy_bytes: float, shapes=SHAPES, ranks=RANKS, tokens=8192, dtype=torch.bfloat16) -> Cases:
    """The compose kernels by themselves, forward and backward, against copy bandwidth."""
    return [partial(_passes, device, copy_bytes, N, r, tokens, dtype) for N, _ in shapes for r in ranks]


def _passes(device, copy_bytes, N, r, tokens, dtype) -> dict:
    sets = [
        [torch.randn(tokens, N, device=device, dtype=dtype) for _ in range(2)]
        for _ in range(sets_for(2 * tokens * N * dtype.itemsize, device))
    ]
    z = sets[0][0]
    p, B = torch.randn(tokens, r, device=device, dtype=dtype), torch.randn(N, r, device=device, dtype=dtype)
    factor, y = torch.rand(N, device=device), torch.empty_like(z)
    add_low = dora_kernels.by_rank("dora_compose", dora_kernels.device_of(z)[0], dtype, r)["ONE_BLOCK"]

    def compose(z):
        dora_kernels.compose(z, p, B, factor, None, SCALE, add_low, y)

    def backward(z, dy):
        dora_kernels.backward(dy, z, p, B, factor, None, SCALE, add_low, True, True, False, False)

    compose(z)
    low = SCALE * p.double() @ B.double().T if add_low else 0
    close("compose", y, factor * (z.double() + low), 1e-2)
    calls = {
        "compose": [lambda z=z: compose(z) for z, _ in sets],
        "backward": [lambda z=z, dy=dy: backward(z, dy) for z, dy in sets],
    }
    seconds = median_seconds(calls, device)
    row = {"T x N": f"{tokens} x {N}", "rank": r}
    for name, moved in (("compose", 2 * z.nbytes), ("backward", 3 * z.nbytes)):
        row[f"{name}_us"] = round(1e6 * seconds[name], 1)
        low = add_low * (p.nbytes + B.nbytes) if name == "compose" else 0
        row[f"{name}_of_copy"] = round((moved + low) / copy_bytes / seconds[name], 3)
    return row


def routes(device, shape=(4096, 4096), rank=16, rows_tried=(1, 16, 64, 256, 1024, 8192), dtype=torch.bfloat16) -> Cases:
    """The two routes of the forward pass by number of rows: what `takes_fused` should choose."""
    return [partial(_routes, device, shape, rank, rows, dtype) for rows in rows_tried]


def _routes(device, shape, rank, rows, dtype) -> dict:
    N, K = shape
    V = [torch.randn(N, K, device=device, dtype=dtype) / K**0.5 for _ in range(sets_for(2 * N * K, device))]
    A, B = torch.randn(rank, K, device=device, dtype=dtype), torch.randn(N, rank, device=device, dtype=dtype)
    factor = torch.rand(N, device=device)
    kept = dora_kernels.FUSED_BELOW

    def call(x, v, bound):
        dora_kernels.FUSED_BELOW = bound
        dora_kernels.forward(x, v, A, B, factor, None, SCALE, None, False)

    x = torch.randn(rows, K, device=device, dtype=dtype)
    calls = {
        name: [lambda v=v, bound=bound: call(x, v, bound) for v in V]
        for name, bound in (("compose", 0), ("fused", 10**9))
    }
    try:
        seconds = median_seconds(calls, device, 0.3)
    finally:
        dora_kernels.FUSED_BELOW = kept
    return {
        "rows": rows,
        "compose_us": round(1e6 * seconds["compose"], 1),
        "fused_us": round(1e6 * seconds["fused"], 1),
        "faster": min(seconds, key=seconds.get),
        "taken": "fused" if rows < kept else "compose",
    }


def compact(device, shapes=SHAPES, rows_tried=(1, 16, 1024, 8192), share=0.25, dtype=torch.bfloat16) -> Cases:
    """compact_linear with ragged indices against the vendor's product of the same kept sizes, contiguous; the last
    shape again with a kept channel less on either side, whose rows are not aligned.
    """
    sizes = [(n_out, n_in, round(n_out * (1 - share)), round(n_in * (1 - share))) for n_out, n_in in shapes]
    sizes.append((*shapes[-1], sizes[-1][2] - 1, sizes[-1][3] - 1))
    return [partial(_compact, device, *size, rows, dtype) for size in sizes for rows in rows_tried]


def _compact(device, n_out, n_in, kept_out, kept_in, rows, dtype) -> dict:
    generator = torch.Generator().manual_seed(0)
    out, into = (
        torch.randperm(n, generator=generator)[:kept].sort().values.to(device)
        for n, kept in ((n_out, kept_out), (n_in, kept_in))
    )
    N, K = out.numel(), into.numel()
    Ws = [torch.randn(N, K, device=device, dtype=dtype) / K**0.5 for _ in range(sets_for(2 * N * K, device))]
    x, packed_x = (torch.randn(rows, n, device=device, dtype=dtype) for n in (n_in, K))
    residual = torch.randn(rows, n_out, device=device, dtype=dtype)
    want = residual.double()
    want[:, out] += packed_x.double() @ Ws[0].double().T
    kept_bound = compact_finish.VENDOR_ROWS

    def scatter(w, bound=kept_bound):
        compact_finish.VENDOR_ROWS = bound
        return ops.compact_linear(packed_x, w, None, None, out, n_out, "none", residual)

    named = {
        "vendor": lambda w: F.linear(packed_x, w),
        "scatter + residual": scatter,
        "by one kernel": lambda w: scatter(w, 10**9),
        "by the vendor and a pass": lambda w: scatter(w, 0),
        "gather": lambda w: ops.compact_linear(x, w, None, into, None, N),
        "index_add": lambda w: residual.index_add(1, out, F.linear(packed_x, w)),
    }
    calls = {name: [lambda f=f, w=w: f(w) for w in Ws] for name, f in named.items()}
    try:
        for name in ("scatter + residual", "by one kernel", "by the vendor and a pass"):
            close(f"compact_linear, {name}", calls[name][0](), want, 1e-2)
        seconds = median_seconds(calls, device, 0.3)
    finally:
        compact_finish.VENDOR_ROWS = kept_bound
    row = {"n_out x n_in": f"{n_out} x {n_in}", "kept": f"{N} x {K}", "rows": rows}
    row |= {f"{name}, us": round(1e6 * s, 1) for name, s in seconds.items()}
    return row | {f"{n}, of vendor": round(seconds["vendor"] / s, 3) for n, s in seconds.items() if n != "vendor"}
