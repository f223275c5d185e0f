"""Table, intervals and plots of what bench.accuracy.compare ran."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.common import bits, report

RUNS = report.RESULTS / "accuracy"
METHODS = {  # name -> shares of the block parameters removed
    "full fine-tuning": (0.0,),
    "LoRA": (0.0,),
    "DoRA": (0.0,),
    "random, uniform": (0.25, 0.5),
    "magnitude, uniform": (0.25, 0.5),
    "saliency, balanced": (0.25, 0.5),
    "LoRA gradient": (0.25, 0.5),
    "ours, paper setting": (0.25,),
    "ours": (0.17, 0.25, 0.5),
}
COLOURS = dict(
    zip(
        METHODS,
        ("#999999", "#56B4E9", "#000000", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2"),
        strict=True,
    )
)
Runs = dict[tuple[str, float], dict[str, dict[int, dict]]]  # (method, share) -> task -> seed -> run


def load_runs(folder: Path = RUNS, tasks: list[str] | None = None, seeds: Mapping[str, int] | None = None) -> Runs:
    """tasks: of these only; None: of all. seeds: how many of each method, the first; None: all there are."""
    runs: Runs = {}
    for one in report.read_runs(folder):
        if (tasks and one["task"] not in tasks) or (seeds and one["seed"] >= seeds[one["method"]]):
            continue
        runs.setdefault((one["method"], one["share"]), {}).setdefault(one["task"], {})[one["seed"]] = one
    return runs


def right(run: dict) -> np.ndarray:
    """Which test texts were answered right, 0.0 or 1.0."""
    return bits.unpacked(run["right"], run["texts"]).astype(float)


def paired(a: dict, b: dict, draws: int = 4000) -> tuple[float, float, float] | None:
    """Mean of a - b in points over the tasks and seeds both have, with a 95 % bootstrap interval.

    a, b: task -> seed -> run. Within each task the differences, averaged over seeds, are drawn again by text, and the
    means by seed are drawn again too, the two deviations added: the interval holds for other texts and other seeds.
    None where nothing is shared.
    """
    rng = np.random.default_rng(0)
    means, resampled = [], []
    for task in sorted(set(a) & set(b)):
        seeds = sorted(set(a[task]) & set(b[task]))
        if not seeds:
            continue
        difference = 100 * np.stack([right(a[task][s]) - right(b[task][s]) for s in seeds])  # [seeds, texts]
        n_seeds, texts = difference.shape
        by_text = rng.multinomial(texts, np.full(texts, 1 / texts), size=draws)
        by_seed = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws)
        of_seeds = by_seed @ difference.mean(1) / n_seeds - difference.mean()
        resampled.append(by_text @ difference.mean(0) / texts + of_seeds)
        means.append(difference.mean())
    if not means:
        return None
    return float(np.mean(means)), *(float(q) for q in np.quantile(np.mean(resampled, axis=0), (0.025, 0.975)))


def _mean(group: dict, key: str) -> float:
    """Mean over tasks of the mean over seeds."""
    return float(np.mean([np.mean([r[key] for r in seeds.values()]) for seeds in group.values()]))


def _interval(found: tuple[float, float, float] | None) -> str | None:
    return None if found is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)


def overlap(seeds: dict[int, dict]) -> float | None:
    """Mean over pairs of seeds: groups kept by both, of those kept by either."""
    masks = []
    for run in seeds.values():
        masks.append(np.concatenate([bits.unpacked(text) for text in run["kept"].values()]))
    pairs = [(x & y).sum() / (x | y).sum() for i, x in enumerate(masks) for y in masks[:i]]
    return float(np.mean(pairs)) if pairs else None


def allocation(group: dict) -> list[dict]:
    """What the plans keep, %, by carrier and block: means over tasks and seeds. Groups come in eights here."""
    shares: dict[str, dict[int, list[float]]] = {}
    for seeds in group.values():
        for run in seeds.values():
            for carrier, text in run["kept"].items():
                block, name = re.search(r"\.(\d+)\.(?:.*\.)?(\w+)$", carrier).groups()
                kept = bits.unpacked(text).mean()
                shares.setdefault(name, {}).setdefault(int(block), []).append(100 * kept)
    return [
        {"carrier": name, **{f"block_{i}": round(float(np.mean(v))) for i, v in sorted(blocks.items())}}
        for name, blocks in shares.items()
    ]


def rows_of(runs: Runs) -> list[dict]:
    tasks = sorted({task for group in runs.values() for task in group})
    rows = []
    for name, share in ((n, s) for n, shares in METHODS.items() for s in shares):
        group = runs.get((name, share))
        if group is None:
            continue
        row = {"method": name, "removed_%": f"{100 * _mean(group, 'removed'):.2f}"}
        for task in tasks:
            scores = [100 * r["accuracy"] for r in group.get(task, {}).values()]
            row[task] = f"{np.mean(scores):.2f} ({len(scores)})" if scores else None
        row["mean"] = f"{100 * _mean(group, 'accuracy'):.2f}" if set(group) == set(tasks) else None
        dora, ours = runs.get(("DoRA", 0.0)), runs.get(("ours", share))
        row["minus_DoRA"] = _interval(paired(group, dora)) if dora and dora is not group else None
        row["ours_minus_it"] = _interval(paired(ours, group)) if ours and ours is not group else None
        rows.append(row)
    return rows


def summarise(out: str, only: list[str] | None = None, seeds: Mapping[str, int] | None = None) -> None:
    runs = load_runs(tasks=only, seeds=seeds)
    rows = rows_of(runs)
    group = next(iter(runs.values()))
    some = next(iter(next(iter(group.values())).values()))
    title = f"test accuracy, %, (seeds); {some['model']}, {some['options']['max_steps']} steps"
    report.table(title, rows)
    overlaps = {
        f"{task}, {100 * share:.0f} %": round(found, 4)
        for (name, share), group in runs.items()
        if name == "ours"
        for task, seeds in sorted(group.items())
        if (found := overlap(seeds)) is not None
    }
    if overlaps:
        report.table("overlap of plans of two seeds: kept by both, of kept by either", [overlaps])
    kept = {f"{share:.0%}": allocation(group) for (name, share), group in runs.items() if name == "ours"}
    for share, table in kept.items():
        report.table(f"kept by ours at {share} removed, % of the carrier's groups", table)
    report.write(out, title=title, rows=rows, overlap=overlaps, kept=kept, options=some["options"])
    plot(runs, title, report.RESULTS / f"{out}.png")


def plot(runs: Runs, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    dora = runs.get(("DoRA", 0.0))
    for name, shares in METHODS.items():
        points = []
        for share in shares:
            found = paired(runs[name, share], dora) if dora and (name, share) in runs else None
            if found:
                points.append((100 * (1 - share), *found))
        if not points:
            continue
        at, mean, low, high = (np.array(v) for v in zip(*points, strict=True))
        axis.errorbar(at, mean, yerr=(mean - low, high - mean), marker="o", capsize=3, label=name, color=COLOURS[name])
    axis.axhline(0, color="black", linewidth=0.6, linestyle=":")
    axis.invert_xaxis()
    axis.set(xlabel="block parameters kept, %", ylabel="accuracy minus DoRA's, points (95 %)", title=title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
