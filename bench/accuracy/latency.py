"""What does accuracy cost in time? Latency of the plans that bench.accuracy.compare ended with, beside their accuracy.

    python -m bench.accuracy.latency                 # 1 x 128 and 8 x 128 tokens, one thread; about 10 minutes
    python -m bench.accuracy.latency --only-report   # table and plot from the times that are there

Times follow from the plan alone, so one seed of each row is built anew with the demo model's weights, compacted,
compared with its definition in float64, and timed in turn with the dense model, on our kernels and eager. Rows without
a plan (full fine-tuning, LoRA, DoRA: all merge into the dense shape) have the time of the dense model on our kernels.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

import prunekern as pk
from bench.accuracy import tables
from bench.common import bits, peers_models, progress, report, shapes, sliced
from bench.common.answers import check_logits
from prunekern.demo.models import demo_model
from prunekern.machine.measure import interleaved, threads

SHAPES = ((1, 128), (8, 128))
DENSE, EAGER = "dense, our kernels", "dense, eager"


def compact_of(run: dict, dense) -> tuple[torch.nn.Module, pk.Plan]:
    """(compact model, plan) that keeps what `run` kept. `dense` is left alone."""
    attached = copy.deepcopy(dense)
    preset = "paper" if "paper" in run["method"] else "full"
    pruner = pk.attach(attached, pk.PruneConfig(sparsity=0.0, preset=preset))
    for carrier, mask in pruner.masks.items():
        mask.finalize(torch.from_numpy(bits.unpacked(run["kept"][carrier], mask.logits.numel())))
    return pk.compact(attached), pruner.plan()


@torch.no_grad()
def measure(runs: tables.Runs, model: str, seconds: float) -> list[dict]:
    """One row for each method, share and task: milliseconds by shape, and the time of the dense model over it."""
    dense = AutoModelForSequenceClassification.from_pretrained(str(demo_model(model))).eval().requires_grad_(False)
    ids, mask = shapes.inputs(1, 128)
    keys = [(*row, task) for row, by_task in runs.items() for task in by_task if "kept" in first(by_task[task])]
    made = {EAGER: dense}
    for key in progress.track([None, *keys], "compacting"):
        if key is None:
            attached = copy.deepcopy(dense)
            pruner = pk.attach(attached, pk.PruneConfig(sparsity=0.0))
            small, plan = pk.compact(attached), pruner.plan()
        else:
            small, plan = compact_of(first(runs[key[:2]][key[2]]), dense)
        small.distilbert.embeddings = dense.distilbert.embeddings  # 47 MB each
        exact = sliced.masked(dense, plan)(ids, attention_mask=mask).logits
        check_logits(str(key), small(ids, attention_mask=mask).logits, exact)
        made[DENSE if key is None else key] = small
    rows = [{"method": m, "share": s, "task": t, "ms": {}, "faster": {}} for m, s, t in keys]
    whole = {EAGER: {}, DENSE: {}}
    with threads(1):
        for batch, tokens in SHAPES:
            ids, mask = shapes.inputs(batch, tokens)
            shape = f"{batch} x {tokens}"
            calls = {key: peers_models.eager(m, ids, mask, 1) for key, m in made.items()}
            with progress.bar(shape) as tell:
                ms = {key: 1e3 * s for key, s in interleaved(calls, seconds, progress=tell).items()}
            for row, key in zip(rows, keys, strict=True):
                row["ms"][shape] = round(ms[key], 2)
                row["faster"][shape] = round(ms[DENSE] / ms[key], 3)
            for name in whole:
                whole[name][shape] = round(ms[name], 2)
    return [
        {"method": name, "share": 0.0, "task": None, "ms": times, "faster": None} for name, times in whole.items()
    ] + rows


def first(seeds: dict[int, dict]) -> dict:
    return seeds[min(seeds)]


def points_of(rows: list[dict], runs: tables.Runs, shape: str) -> dict[str, list[tuple]]:
    """method -> [(latency over the dense model's, accuracy minus DoRA's, low, high)], by share."""
    dense = next(r["ms"][shape] for r in rows if r["method"] == DENSE)
    points: dict[str, list[tuple]] = {}
    for name, shares in tables.METHODS.items():
        for share in shares:
            if (name, share) not in runs or name == "DoRA":
                continue
            found = tables.paired(runs[name, share], runs["DoRA", 0.0])
            times = [r["ms"][shape] for r in rows if (r["method"], r["share"]) == (name, share)]
            if found and (times or share == 0):
                points.setdefault(name, []).append((float(np.mean(times)) / dense if times else 1.0, *found))
    return points


def plot(rows: list[dict], runs: tables.Runs, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(12, 4.8), layout="constrained", sharey=True)
    for axis, (batch, tokens) in zip(axes, SHAPES, strict=True):
        shape = f"{batch} x {tokens}"
        for name, points in points_of(rows, runs, shape).items():
            at, mean, low, high = (np.array(v) for v in zip(*points, strict=True))
            axis.errorbar(
                100 * at, mean, yerr=(mean - low, high - mean), marker="o", capsize=3, label=name,
                color=tables.COLOURS[name], linestyle="-" if len(points) > 1 else "none",
            )  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel=f"latency, % of the dense model on the same kernels ({shape}, one thread)")
    axes[0].set(ylabel="accuracy minus DoRA's, points (95 %)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0, help="about how long to measure each shape")
    parser.add_argument("--seeds", type=int, default=0, help="the first so many of each method; 0: all there are")
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="accuracy_latency")
    args = parser.parse_args()
    seeds = dict.fromkeys(tables.METHODS, args.seeds) if args.seeds else None
    runs, path = tables.load_runs(seeds=seeds), report.RESULTS / f"{args.out}.json"
    if args.only_report:
        rows = report.read(args.out)["rows"]
    else:
        rows = measure(runs, first(next(iter(next(iter(runs.values())).values())))["model"], args.seconds)
        report.write(args.out, rows=rows, args=vars(args))
    flat = [
        {**{k: r[k] for k in ("method", "share", "task")}, **{f"ms, {s}": t for s, t in r["ms"].items()}} for r in rows
    ]
    report.table("latency of the plans, fp32, one thread", flat)
    plot(rows, runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
