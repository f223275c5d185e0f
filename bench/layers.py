"""How fast is compact_linear, against everyone else who multiplies fp32 matrices on this CPU?

    python bench/layers.py                 # the shapes of BERT-base blocks, whole and pruned; under 3 minutes
    python bench/layers.py --shapes 4096x4096,4096x11008 --rows 1,64 --repeats 0.5

First every peer's answer is compared with float64; then all peers take turns in one process, call by call (so each
finds its weights where the others left them: not in L2), and the minimum over many turns counts. A second table has
the options a compact layer uses: activation, scatter into the residual, gather.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import peers
import report
import torch
from torch import Tensor

from prunekern import _native, info
from prunekern.ops import compact_linear, pack_weight

SHAPES = "768x768,3072x768,768x3072,2319x768,577x768"
ROWS = "1,16,128,1024"
# Turns by rows: about 0.5 s a peer and shape.
TURNS = ((1, 1500), (16, 500), (128, 120), (1024, 24), (10**9, 8))
Run = Callable[[], Tensor]


def check(name: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises unless y is x W^T + b to fp32 rounding of a sum of K + 1 terms."""
    exact = x.double() @ weight.double().T
    size = x.abs().double() @ weight.abs().double().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.abs().double()
    excess = (y.double() - exact).abs() - (weight.shape[1] + 1) * 2.0**-24 * size
    if not bool((excess <= 0).all()):
        raise SystemExit(f"{name}: wrong answer for {list(x.shape)} x {list(weight.shape)} (off by {excess.max():.3g})")


def race(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Shortest seconds of each; the order turns round so that nobody always follows the same neighbour."""
    best = dict.fromkeys(runs, math.inf)
    order = list(runs)
    for turn in range(turns):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            run = runs[name]
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_gflops(repeats: int = 200) -> float:
    """What the FMA units of one core do without touching memory, GFLOP/s."""
    core = _native.core()
    best, flops = math.inf, 0
    for _ in range(repeats):
        start = time.perf_counter()
        flops = core.run_peak(100_000)
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


def turns_for(m: int, repeats: float) -> int:
    return max(3, int(repeats * next(turns for rows, turns in TURNS if m <= rows)))


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def dense(args: argparse.Namespace, peak: float) -> list[dict]:
    """One row per shape: GFLOP/s of each peer, ours over each."""
    rows = []
    for m in args.rows:
        for n, k in args.shapes:
            x, weight, bias = torch.randn(m, k), torch.randn(n, k), None if args.no_bias else torch.randn(n)
            functions = {name: make(weight, bias, m) for name, make in peers.PEERS.items()}
            for name, function in functions.items():
                check(name, function(x), x, weight, bias)
            runs = {name: (lambda f=f, x=x: f(x)) for name, f in functions.items()}
            best = race(runs, turns_for(m, args.repeats))
            flops, ours = 2 * m * n * k, best[peers.OURS]
            row = {"rows": m, "N": n, "K": k, **{name: round(flops / s / 1e9, 1) for name, s in best.items()}}
            others = {name: s for name, s in best.items() if name != peers.OURS}
            row["x F.linear"] = round(best["F.linear"] / ours, 3)
            row["x best"] = round(min(others.values()) / ours, 3)
            row["of peak"] = round(flops / ours / 1e9 / peak, 3)
            rows.append(row)
    return rows


def options(args: argparse.Namespace) -> list[dict]:
    """What the epilogue and the index cost: 3/4 of 768 channels kept, time over that of the plain product."""
    rows = []
    n, k, full = 576, 768, 768
    bias = torch.randn(n)
    out_index = torch.randperm(full)[:n].sort().values
    in_index = torch.randperm(1024)[:k].sort().values
    variants = {  # in_index, out_index, n_out, activation
        "plain": (None, None, n, "none"),
        "gelu": (None, None, n, "gelu"),
        "silu": (None, None, n, "silu"),
        "scatter": (None, out_index, full, "none"),
        "scatter + residual": (None, out_index, full, "none"),
        "gather": (in_index, None, n, "none"),
    }
    for m in args.rows:
        x, wide, residual = torch.randn(m, k), torch.randn(m, 1024), torch.randn(m, full)
        runs = {}
        for name, (gather, scatter, n_out, activation) in variants.items():
            source = x if gather is None else wide
            rest = (bias, gather, scatter, n_out, activation, residual if "residual" in name else None)
            # Each has a weight of its own: a shared one would lie in L2 for whoever comes second.
            packed = pack_weight(torch.randn(n, k) / k**0.5)
            runs[name] = lambda x=source, packed=packed, rest=rest: compact_linear(x, packed, *rest)
        weight = torch.randn(n, k)
        runs["unfused: linear, index_add"] = lambda x=x, r=residual, w=weight: r.index_add(
            -1, out_index, torch.nn.functional.linear(x, w, bias)
        )
        best = race(runs, turns_for(m, args.repeats))
        rows.append(
            {"rows": m, "plain us": round(best["plain"] * 1e6, 1)}
            | {name: f"{s / best['plain']:.3f}" for name, s in best.items() if name != "plain"}
        )
    return rows


def overhead() -> dict[str, float]:
    """Microseconds of a call too small to compute anything: ours, and F.linear's."""
    x, weight, bias = torch.randn(1, 8), torch.randn(32, 8), torch.randn(32)
    runs = {name: peers.PEERS[name](weight, bias, 1) for name in (peers.OURS, "F.linear")}
    return {
        name: round(s / 100 * 1e6, 2)
        for name, s in race({n: (lambda f=f: [f(x) for _ in range(100)]) for n, f in runs.items()}, 100).items()
    }


def picture(rows: list[dict], path) -> None:
    """Bars: ours over each peer, one group per shape, one panel per number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted({row["rows"] for row in rows})
    figure, axes = plt.subplots(len(counts), 1, figsize=(9, 2.2 * len(counts)), sharex=True, squeeze=False)
    for axis, m in zip(axes[:, 0], counts, strict=True):
        group = [row for row in rows if row["rows"] == m]
        for i, name in enumerate(peers.PEERS):
            axis.bar([j + i * 0.2 for j in range(len(group))], [row[name] for row in group], 0.19, label=name)
        axis.set_ylabel(f"{m} rows\nGFLOP/s")
        axis.set_xticks([j + 0.3 for j in range(len(group))], [f"{row['N']} x {row['K']}" for row in group])
    axes[0, 0].legend(ncols=len(peers.PEERS), fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    def shapes(text: str) -> list[tuple[int, int]]:
        return [tuple(int(v) for v in shape.split("x")) for shape in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help=f"N x K, default {SHAPES}")
    parser.add_argument("--rows", type=lambda t: [int(v) for v in t.split(",")], default=ROWS, help=f"default {ROWS}")
    parser.add_argument("--repeats", type=float, default=1.0, help="factor on the number of turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-bias", action="store_true")
    parser.add_argument("--name", default="layers", help="of the files in bench/results/")
    args = parser.parse_args()
    if isinstance(args.rows, str):
        args.rows = [int(v) for v in args.rows.split(",")]
    return args


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    facts = info()
    if not facts["kernels"]:
        raise SystemExit(facts["remedy"])
    start = time.perf_counter()
    peak = peak_gflops() * args.threads
    rows = dense(args, peak)
    peak = max(peak, peak_gflops() * args.threads)
    summary = {
        "geomean x F.linear": round(geomean([row["x F.linear"] for row in rows]), 3),
        "geomean x best": round(geomean([row["x best"] for row in rows]), 3),
        **{
            f"geomean x best at {m} rows": round(geomean([r["x best"] for r in rows if r["rows"] == m]), 3)
            for m in args.rows
        },
        "peak GFLOP/s": round(peak, 1),
        "wrapper us": overhead(),
    }
    report.table(
        f"fp32 linear layers, {args.threads} thread(s), {facts['isa']}: GFLOP/s, and ours over the peers", rows
    )
    extra = options(args)
    report.table("compact_linear 576 x 768: time of its options over the plain product", extra)
    for name, value in summary.items():
        print(f"{name}: {value}")
    print(f"{time.perf_counter() - start:.0f} s")
    path = report.write(args.name, isa=facts["isa"], summary=summary, layers=rows, options=extra)
    picture(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
