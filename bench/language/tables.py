"""Table and plot of what bench.language.compare ran."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.common import bits, report

RUNS = report.RESULTS / "language"
UNTRAINED = "as it came"
METHODS = {  # name -> shares of the block parameters removed
    UNTRAINED: (0.0,),
    "dense": (0.0,),
    "ours": (0.2, 0.5),
    "random": (0.2, 0.5),
    "magnitude": (0.2, 0.5),
    "Taylor": (0.2, 0.5),
    "LoRA gradient": (0.2, 0.5),
    "saliency, balanced": (0.2, 0.5),
}
COLOURS = dict(
    zip(METHODS, ("#999999", "#000000", "#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#009E73"), strict=True)
)


def path_of(folder: Path, name: str, share: float, seed: int) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{round(100 * share)}-{seed}.json"


def right(run: dict, task: str) -> np.ndarray:
    """Which test items were answered right, 0.0 or 1.0."""
    return bits.unpacked(run["right"][task], run["items"][task]).astype(float)


def paired(a: dict, b: dict, draws: int = 4000) -> tuple[float, float, float]:
    """Mean accuracy of a minus b in points over the tasks, with a 95 % bootstrap interval over the items."""
    rng = np.random.default_rng(0)
    means, resampled = [], []
    for task, count in a["items"].items():
        difference = 100 * (right(a, task) - right(b, task))
        by_item = rng.multinomial(count, np.full(count, 1 / count), size=draws)
        resampled.append(by_item @ difference / count)
        means.append(difference.mean())
    return float(np.mean(means)), *(float(q) for q in np.quantile(np.mean(resampled, axis=0), (0.025, 0.975)))


def rows_of(runs: list[dict]) -> list[dict]:
    """A row a method and share; perplexity against the dense model that saw the same tokens."""
    dense = next((r for r in runs if r["method"] == "dense"), None)
    ours = {r["share"]: r for r in runs if r["method"] == "ours"}
    rows = []
    for one in runs:
        beside = ours.get(one["share"])
        mean = float(np.mean(list(one["accuracy"].values())))
        gap = paired(beside, one) if beside and one is not beside else None
        rows.append(
            {
                "method": one["method"],
                "removed_%": round(100 * one.get("removed", 0.0), 2),
                "perplexity": round(one["perplexity"], 2),
                "x_dense": round(one["perplexity"] / dense["perplexity"], 3) if dense else None,
                **{f"{name}_%": round(100 * value, 1) for name, value in one["accuracy"].items()},
                "mean_%": round(100 * mean, 2),
                "ours_minus_it": "{:+.2f} [{:+.2f}, {:+.2f}]".format(*gap) if gap else None,
            }
        )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted({round(row["removed_%"]) for row in rows} - {0})
    figure, axes = plt.subplots(2, max(1, len(shares)), figsize=(9.5, 6), layout="constrained", squeeze=False)
    for column, share in enumerate(shares):
        shown = [row for row in rows if round(row["removed_%"]) in (0, share)]
        for axis, key, label in (
            (axes[0, column], "perplexity", "perplexity"),
            (axes[1, column], "mean_%", "items, %"),
        ):
            values = [row[key] for row in shown]
            bars = axis.barh([row["method"] for row in shown], values, color=[COLOURS[row["method"]] for row in shown])
            axis.bar_label(bars, padding=2, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            if key == "perplexity" and max(values) > 4 * min(values):
                axis.set_xscale("log")
                axis.set_xlim(left=10, right=6 * max(values))
            if key == "mean_%":
                axis.set_xlim(left=0.9 * min(values))
            axis.set(xlabel=label, title=f"{share} % of the block parameters removed" if key == "perplexity" else "")
    figure.suptitle("SmolLM2-135M, dequantised, after the same training tokens", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def summarise(folder: Path, out: str) -> None:
    """Table on the terminal, JSON and plot, of the runs in `folder`."""
    order = list(METHODS)
    runs = report.read_runs(folder)
    runs.sort(key=lambda r: (r["share"], order.index(r["method"]), r["seed"]))
    if not runs:
        raise SystemExit(f"{folder}: no runs yet")
    rows = rows_of(runs)
    report.table("SmolLM2-135M, dequantised: Wikipedia perplexity, accuracy on items", rows)
    tokens = next((r["tokens"] for r in runs if "tokens" in r), None)
    path = report.write(out, model="smollm2-135m", tokens=tokens, rows=rows)
    plot(rows, path.with_suffix(".png"))
