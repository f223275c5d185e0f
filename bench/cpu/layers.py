"""How fast is compact_linear, against everyone else who multiplies matrices on this CPU, in fp32, bf16 and int8?

    python -m bench.cpu.layers                 # shapes of BERT-base and LLaMA-7B blocks, whole and pruned: 15 minutes
    python -m bench.cpu.layers --precision int8 --name layers-int8    # of one arithmetic: 3 minutes
    python -m bench.cpu.layers --quick         # every table on small shapes: does it run, are the answers right
    python -m bench.cpu.layers --threads 2     # peers and ours on two threads

First every peer's answer is compared with float64; then all peers take turns in one process, call by call (so each
finds its weights where the others left them: not in L2), and the minimum over many turns counts. Further tables
(bench/cpu/layer_tables.py): what gather, scatter and residual cost; one row on 1 GB of weights in fp32, bf16 and int8;
the kinds of weights over rows; compact_mlp against separate calls; two threads against one. In bf16 and int8
(bench/cpu/layers_narrow.py) answers are held to decibels of the same weights in float64, and the peak is that of the
arithmetic. Peers are told once with the rounding of x and once given a rounded x; ours rounds it itself.
"""

from __future__ import annotations

import argparse
import time

import torch

from bench.common import peaks, peers, peers_narrow, progress, report, safe
from bench.common.answers import check, geomean, randn
from bench.common.turns import race
from bench.cpu import layer_tables as tables
from bench.cpu import layers_narrow as narrow
from prunekern import info
from prunekern.machine.measure import peak_gflops, read_bandwidth, run_peak

SHAPES = "768x768,3072x768,768x3072,2319x768,768x2319,577x768,4096x4096,8311x4096"
ROWS = "1,4,16,32,128,512,1024"
FEW, MANY = 4, 128  # up to FEW rows the weights' bytes bind, from MANY the multiply-adds
PEAK = "FMA peak"  # a peer that touches no memory
LONG = 60e-6  # seconds of a peer from which no shape may fall behind


def dense(args: argparse.Namespace, bandwidth: float) -> list[dict]:
    """One row per shape: GFLOP/s of each peer, ours over each, and the fraction of the bandwidth for few rows."""
    rows = []
    for n, k in args.shapes:
        weight, bias = randn(n, k, seed=1), randn(n, seed=2)
        for m in args.rows:
            x = randn(m, k)
            functions = {name: make(weight, bias, m) for name, make in peers.PEERS.items()}
            for name, function in functions.items():
                check(name, function(x), x, weight, bias)
            runs = {name: (lambda f=f, x=x: f(x)) for name, f in functions.items()}
            flops = 2 * m * n * k
            if m >= MANY:  # in turn with the others: the clock of a shared machine moves by a fifth within minutes
                runs[PEAK] = lambda flops=flops: run_peak(flops)
            best = race(runs, args.seconds)
            ours, peak = best[peers.OURS], best.pop(PEAK, None)
            row = {"rows": m, "N": n, "K": k, **{name: round(flops / s / 1e9, 1) for name, s in best.items()}}
            others = min(s for name, s in best.items() if name != peers.OURS)
            row |= {"x F.linear": round(best["F.linear"] / ours, 3), "x best": round(others / ours, 3)}
            row |= {"best us": round(others * 1e6, 1)}
            row["of peak"] = round(peak / ours / args.threads, 3) if peak else None
            row["of bandwidth"] = round(4 * n * k / ours / 1e9 / bandwidth, 3) if m <= FEW else None
            rows.append(row)
        progress.say(f"  {n} x {k} done")
    return rows


def summary(rows: list[dict]) -> dict[str, dict]:
    """What was asked of the table, and whether it holds."""
    long = [row for row in rows if row["best us"] > LONG * 1e6] or rows
    worst = min(long, key=lambda row: row["x best"])
    return {
        "geomean x F.linear": tables.wanted(geomean(row["x F.linear"] for row in rows), 1.25),
        "geomean x best peer": tables.wanted(geomean(row["x best"] for row in rows), 1.03),
        f"lowest x best peer over {LONG * 1e6:.0f} us": tables.wanted(worst["x best"], 0.93)
        | {"at": f"{worst['rows']} rows, {worst['N']} x {worst['K']}"},
        f"geomean of peak from {MANY} rows": tables.wanted(
            geomean(row["of peak"] for row in rows if row["rows"] >= MANY), 0.90
        ),
    }


def overhead() -> dict[str, float]:
    """Microseconds of a call too small to compute anything: ours, and F.linear's."""
    x, weight, bias = randn(1, 8), randn(32, 8), randn(32)
    runs = {name: peers.PEERS[name](weight, bias, 1) for name in (peers.OURS, "F.linear")}
    hundred = {name: (lambda f=f: [f(x) for _ in range(100)]) for name, f in runs.items()}
    return {name: round(s / 100 * 1e6, 2) for name, s in race(hundred, 0.05).items()}


def picture(rows: list[dict], names: list[str], unit: str, path) -> None:
    """1e9 operations a second of every peer over the rows, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((row["N"], row["K"]) for row in rows))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.2 * columns, 2.8 * lines), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes.flat, shapes, strict=False):
        group = [row for row in rows if (row["N"], row["K"]) == (n, k)]
        for name in names:
            axis.plot(
                [str(row["rows"]) for row in group],
                [row[name] for row in group],
                marker="o",
                markersize=3,
                linewidth=2 if name == peers.OURS else 1,
                label=name,
            )
        axis.set_title(f"{n} x {k}", fontsize="medium")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel(unit)
    for axis in axes[-1]:
        axis.set_xlabel("rows")
    axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    def shapes(text: str) -> list[tuple[int, int]]:
        return [tuple(int(v) for v in shape.split("x")) for shape in text.split(",")]

    def numbers(text: str) -> list[int]:
        return [int(v) for v in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help=f"N x K, default {SHAPES}")
    parser.add_argument("--rows", type=numbers, default=numbers(ROWS), help=f"default {ROWS}")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each peer at each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="all", choices=["all", *peaks.ARITHMETICS], help="of the arithmetic")
    parser.add_argument("--only", default="", help="of fp32 the first table only", choices=["", "dense"])
    parser.add_argument("--quick", action="store_true", help="small shapes, few turns: a test of the script")
    parser.add_argument("--name", default="layers", help="of the files in bench/results/")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.rows, args.seconds = shapes("96x64,65x96"), [1, 16, 128], 0.002
    return args


def wide(args: argparse.Namespace, facts: dict, bandwidth: float) -> tuple[dict[str, list], dict[str, dict]]:
    """(every table of fp32 by its name in the JSON, what must hold of them), shown."""
    made = {"layers": dense(args, bandwidth)}
    holds = summary(made["layers"])
    title = f"fp32 linear layers, {args.threads} thread(s), {facts['isa']}: GFLOP/s, and ours over the peers"
    report.table(title, made["layers"])
    if not args.only:
        for name, (title, rows, held) in tables.all_tables(args, facts).items():
            if rows:
                report.table(title, rows)
            made[name] = rows
            holds |= held
    return made, holds


@torch.no_grad()
def main() -> None:
    args = parse()
    precisions = peaks.ARITHMETICS if args.precision == "all" else (args.precision,)
    isa_of_onednn = safe.without_amx_if_it_kills() if precisions != ("fp32",) else None
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    facts = info()
    if not facts["kernels"]:
        raise SystemExit(facts["remedy"])
    start = time.perf_counter()
    bandwidth = read_bandwidth(2**24 if args.quick else 2**30)
    made, holds = wide(args, facts, bandwidth) if "fp32" in precisions else ({}, {})
    for precision in precisions:
        if precision != "fp32":
            title, made[precision], held = narrow.table(precision, args, bandwidth)
            report.table(f"{title}; {args.threads} thread(s), {facts['isa']}", made[precision])
            holds |= held
    report.table("What must hold", [{"what": name, **entry} for name, entry in tables.aligned(holds).items()])
    facts = {"isa": facts["isa"], "amx": facts["amx"], "oneDNN held to": isa_of_onednn}
    facts |= {"peak GFLOP/s": round(peak_gflops(), 1)}
    facts |= {f"peak {name} Gop/s": peaks.rounded_gops(name) for name in precisions if name != "fp32"}
    facts |= {"read GB/s": round(bandwidth, 1), "wrapper us": overhead()}
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"{time.perf_counter() - start:.0f} s")
    path = report.write(args.name, **facts, summary=holds, **made)
    for name in ("layers", *narrow.PRECISIONS):
        if name == "layers" and made.get(name):
            picture(made[name], list(peers.PEERS), "GFLOP/s", path.with_suffix(".png"))
        elif made.get(name):
            among = list(peers_narrow.PEERS[name])
            picture(made[name], among, f"{name}, 1e9 operations/s", path.with_name(f"{path.stem}_{name}.png"))


if __name__ == "__main__":
    main()
