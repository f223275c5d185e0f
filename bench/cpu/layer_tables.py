"""The further tables of bench/cpu/layers.py. Each is (title, rows, what must hold of them)."""

from __future__ import annotations

import argparse
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import peers, progress
from bench.common.answers import check, geomean, randn, within
from bench.common.turns import race
from prunekern import _native
from prunekern.machine.measure import threads
from prunekern.ops import compact_linear, compact_mlp, pack_weight, quantize_weight

KINDS = ("fp32", "bf16", "int8")
Table = tuple[str, list[dict], dict[str, dict]]


def wanted(value: float, least: float | None = None, most: float | None = None) -> dict:
    """A figure beside what was asked of it."""
    ok = (least is None or value >= least) and (most is None or value <= most)
    return {"value": round(value, 3), "wanted": f">= {least}" if least is not None else f"<= {most}", "holds": ok}


def not_measured(least: float, why: str) -> dict:
    """A figure this machine cannot give."""
    return {"value": None, "wanted": f">= {least}", "holds": None, "at": f"not measured: {why}"}


def aligned(holds: dict[str, dict]) -> dict[str, dict]:
    """The same with all columns, for a table."""
    return {name: {"value": None, "wanted": None, "holds": None, "at": None} | e for name, e in holds.items()}


def all_tables(args: argparse.Namespace, facts: dict) -> dict[str, Table]:
    """Every table, by its name in the JSON."""
    made = {
        "indices": lambda: indices(args),
        "one row": lambda: one_row(args),
        "kinds": lambda: kinds(args, facts),
        "mlp": lambda: mlp(args, facts),
    }
    if args.threads == 1:
        made["two threads"] = lambda: two_threads(args)
    tables = {}
    for name, make in made.items():
        tables[name] = make()
        progress.say(f"  table of {name} done")
    return tables


def packed(weight: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """(panels, scale or None) of a float weight in one of the KINDS."""
    if kind == "int8":
        q, scale = quantize_weight(weight)
        return pack_weight(q), scale
    return pack_weight(weight if kind == "fp32" else weight.bfloat16()), None


def kept(count: int, total: int, seed: int) -> Tensor:
    """`count` of `total` channels, sorted."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def indices(args: argparse.Namespace) -> Table:
    """A ragged layer against the same product without indices, and against what one would write in PyTorch."""
    rows = []
    sizes = (
        ((64, 96, 48, 64),) if args.quick else ((576, 768, 576, 768), (576, 768, 2304, 3072), (2304, 3072, 576, 768))
    )
    for n, n_out, k, k_in in sizes:
        for m in args.rows:
            x, residual = randn(m, k_in, seed=m), randn(m, n_out, seed=m + 1)
            weights = [randn(n, k, seed=i) / k**0.5 for i in range(3)]
            bias, out_index, in_index = randn(n), kept(n, n_out, 1), kept(k, k_in, 2)
            fused, plain = pack_weight(weights[0]), pack_weight(weights[1])
            narrow = x[:, in_index].contiguous()
            rest = (bias, in_index, out_index, n_out, "none", residual)
            y = compact_linear(x, fused, *rest)
            check("fused", (y - residual)[:, out_index], narrow, weights[0], bias) if k < 300 else None
            exact = residual.double().index_add(1, out_index, narrow.double() @ weights[0].double().T + bias.double())
            within("fused", y, exact, 1e-5 * exact.abs().max())
            best = race(
                {
                    "plain": lambda x=narrow, w=plain, b=bias, n=n: compact_linear(x, w, b, None, None, n),
                    "fused": lambda x=x, w=fused, r=rest: compact_linear(x, w, *r),
                    "PyTorch": lambda x=x, w=weights[2], b=bias, r=residual, i=in_index, o=out_index: r.index_add(
                        1, o, F.linear(x.index_select(1, i), w, b)
                    ),
                },
                args.seconds,
            )
            row = {"rows": m, "N": f"{n} of {n_out}", "K": f"{k} of {k_in}", "fused us": round(best["fused"] * 1e6, 1)}
            row |= {"x plain": round(best["fused"] / best["plain"], 3)}
            row |= {"x PyTorch": round(best["PyTorch"] / best["fused"], 3)}
            rows.append(row)
    title = (
        "gather + scatter + residual: time over the product without indices; PyTorch's index_select, linear, index_add"
    )
    return title, rows, {
        "indices and residual, time over none": wanted(geomean(r["x plain"] for r in rows), most=1.05),
        "indices and residual, time over none, from 128 rows": wanted(
            geomean(r["x plain"] for r in rows if r["rows"] >= 128), most=1.05
        ),
        "fused x index_select, linear, index_add": wanted(geomean(r["x PyTorch"] for r in rows), 1.3),
    }  # fmt: skip


def one_row(args: argparse.Namespace) -> Table:
    """One row times a weight that no cache holds: the bytes are all that counts."""
    n = k = 512 if args.quick else 16384
    x, weight = randn(1, k), torch.empty(n, k)
    for i in range(0, n, 1024):
        weight[i : i + 1024] = randn(1024 if i + 1024 <= n else n - i, k, seed=i) / k**0.5
    runs, sizes = {}, {}
    for kind in KINDS:
        panels, scale = packed(weight, kind)
        sizes[kind] = panels.numel() * panels.element_size()
        runs[kind] = lambda w=panels, s=scale: compact_linear(x, w, None, None, None, n, scale=s)
        last = slice(n - 512, n)
        exact = x.double() @ weight[last].double().T
        within(kind, runs[kind]()[:, last], exact, {"fp32": 1e-4, "bf16": 0.02, "int8": 0.06}[kind])
        if kind == "fp32":
            core, address = _native.core(), panels.data_ptr()
            runs["read"] = lambda core=core, a=address, b=sizes[kind], keep=panels: core.run_read(a, b)
    runs["F.linear"] = lambda: F.linear(x, weight)
    best = race(runs, args.seconds * 5)
    read = sizes["fp32"] / best["read"]
    rows = [
        {
            "weights": name,
            "ms": round(best[name] * 1e3, 3),
            "GB/s": round(size / best[name] / 1e9, 2),
            "of read bandwidth": round(size / best[name] / read, 3),
            "x fp32": round(best["fp32"] / best[name], 3),
        }
        for name, size in (*sizes.items(), ("F.linear", sizes["fp32"]))
    ]
    by = {row["weights"]: row for row in rows}
    return f"1 x {k} times {n} x {k}; reading alone: {read / 1e9:.2f} GB/s", rows, {
        "one row fp32, of read bandwidth": wanted(by["fp32"]["of read bandwidth"], 0.85),
        "one row bf16 x fp32": wanted(by["bf16"]["x fp32"], 1.8),
        "one row int8 x fp32": wanted(by["int8"]["x fp32"], 3.0),
    }  # fmt: skip


def kinds(args: argparse.Namespace, facts: dict) -> Table:
    """bf16 and int8 weights over fp32 ones."""
    rows = []
    for n, k in ((96, 64),) if args.quick else ((768, 768), (3072, 768), (4096, 4096)):
        weight = randn(n, k, seed=3) / k**0.5
        panels = {kind: packed(weight, kind) for kind in KINDS}
        for m in args.rows:
            x = randn(m, k)
            runs = {
                kind: (lambda x=x, w=w, s=s, n=n: compact_linear(x, w, None, None, None, n, scale=s))
                for kind, (w, s) in panels.items()
            }
            best = race(runs, args.seconds)
            rows.append(
                {"rows": m, "N": n, "K": k}
                | {f"{kind} GFLOP/s": round(2 * m * n * k / best[kind] / 1e9, 1) for kind in KINDS}
                | {f"{kind} x fp32": round(best["fp32"] / best[kind], 3) for kind in KINDS[1:]}
            )
    many = geomean(row["bf16 x fp32"] for row in rows if row["rows"] >= 128)
    amx = wanted(many, 4.0) if facts["isa"] == "amx" else not_measured(4.0, facts["amx"])
    return "kinds of weights", rows, {"AMX bf16 x fp32 from 128 rows": amx}


def mlp(args: argparse.Namespace, facts: dict) -> Table:
    """compact_mlp against one call a layer."""
    rows = []
    gated = (64, 160, 64, True) if args.quick else (4096, 11008, 4096, True)
    plain = ((64, 160, 64, False),) if args.quick else ((768, 3072, 768, False), (768, 2319, 768, False))
    for k, h, n, gate in (*plain, gated):
        weights = [randn(h, k, seed=1) / k**0.5, randn(n, h, seed=2) / h**0.5, randn(h, k, seed=3) / k**0.5]
        for kind in ("fp32", "bf16"):
            (up, _), (down, _), (third, _) = (packed(w, kind) for w in weights)
            for m in args.rows:
                if gate and m not in (16, 128):
                    continue
                x, residual = randn(m, k), randn(m, n, seed=1)
                extra = {"gate": third, "activation": "silu"} if gate else {"activation": "gelu"}

                def one(x=x, up=up, down=down, h=h, n=n, r=residual, extra=extra):
                    return compact_mlp(x, up, down, n_hidden=h, n_out=n, residual=r, **extra)

                def each(x=x, up=up, down=down, third=third, h=h, n=n, r=residual, gate=gate):
                    y = compact_linear(x, up, None, None, None, h, "none" if gate else "gelu")
                    if gate:
                        y = compact_linear(x, third, None, None, None, h, "silu").mul_(y)
                    return compact_linear(y, down, None, None, None, n, "none", r)

                within("compact_mlp", one(), each().double(), 1e-4 if kind == "fp32" else 0.05)
                # the two are 1 % apart and the machine moves by 3: many turns
                best = race({"one call": one, "a call each": each}, args.seconds, least=40)
                rows.append(
                    {"rows": m, "mlp": f"{k} > {h}{' gated' if gate else ''} > {n}", "weights": kind}
                    | {f"{name} us": round(s * 1e6, 1) for name, s in best.items()}
                    | {"x": round(best["a call each"] / best["one call"], 3)}
                )
    by = {kind: [row for row in rows if row["weights"] == kind] for kind in ("fp32", "bf16")}
    wide = [row["x"] for row in by["bf16"] if row["rows"] == max(args.rows)]
    lowest = min(by["fp32"], key=lambda row: row["x"])
    return "compact_mlp against compact_linear twice (and a product where gated)", rows, {
        "compact_mlp fp32 x separate calls, geomean": wanted(geomean(row["x"] for row in by["fp32"]), 1.0),
        "compact_mlp fp32 x separate calls, lowest": wanted(lowest["x"], 1.0)
        | {"at": f"{lowest['rows']} rows, {lowest['mlp']}"},
        "compact_mlp bf16 on AMX x separate calls at 1024 rows": wanted(geomean(wide), 1.08)
        if facts["isa"] == "amx"
        else not_measured(1.08, facts["amx"]),
    }  # fmt: skip


def two_threads(args: argparse.Namespace) -> Table:
    """One thread's time over that of two. Wants a machine with nothing else to do."""
    title = "two threads: time of one over theirs"
    cores = len(os.sched_getaffinity(0))  # not those of the machine: taskset may have left us one
    if cores < 2:
        return title, [], {f"two threads x one, {peers.OURS}": not_measured(1.7, "one core for this process")}
    rows = []

    def on(count: int, run):
        def call():
            with threads(count):
                run()

        return call

    for n, k in args.shapes:
        weight, bias = randn(n, k, seed=1), randn(n, seed=2)
        for m in (m for m in args.rows if m >= 128):
            x = randn(m, k)
            functions = {
                name: make(weight, bias, m) for name, make in peers.PEERS.items() if name != "oneDNN prepacked"
            }
            runs = {
                f"{name} {count}": on(count, lambda f=f, x=x: f(x)) for name, f in functions.items() for count in (1, 2)
            }
            best = race(runs, args.seconds / 2)
            rows.append(
                {"rows": m, "N": n, "K": k}
                | {name: round(best[f"{name} 1"] / best[f"{name} 2"], 3) for name in functions}
            )
    return title, rows, {
        f"two threads x one, {name}": wanted(geomean(row[name] for row in rows), 1.7)
        if name == peers.OURS
        else {"value": round(geomean(row[name] for row in rows), 3), "wanted": None, "holds": None}
        for name in rows[0]
        if name not in ("rows", "N", "K")
    }  # fmt: skip
