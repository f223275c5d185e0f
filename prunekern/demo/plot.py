"""One picture of a run: how it trained, kept channels by layer and kind, and latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..compacting.plan import Plan
from ..training import curves

# Colour-blind safe (Okabe and Ito).
COLOURS = {
    "query / key": "#0072B2",
    "value": "#56B4E9",
    "attention out": "#009E73",
    "FFN": "#E69F00",
    "FFN out": "#D55E00",
}


def kept_by_block(plan: Plan) -> dict[str, list[float]]:
    """Kept share of rows by kind, one entry a block. Layers come as q k v o up down."""
    layers = list(plan.layers.values())
    kinds = dict(zip(COLOURS, (0, 2, 3, 4, 5), strict=True))
    share = [layer.rows.numel() / layer.out_features for layer in layers]
    return {kind: share[offset::6] for kind, offset in kinds.items()}


def plot(report: dict[str, Any], plan: Plan, path: Path) -> None:
    """Write the picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic([["a", "b"], ["left", "right"]], figsize=(12, 8), layout="constrained")
    curves.draw((axes["a"], axes["b"]), report["trained"]["history"], report["trained"])
    left, right = axes["left"], axes["right"]
    kept = kept_by_block(plan)
    blocks = len(next(iter(kept.values())))
    width = 0.8 / len(kept)
    for i, (kind, shares) in enumerate(kept.items()):
        at = [block + (i - (len(kept) - 1) / 2) * width for block in range(blocks)]
        left.bar(at, [100 * s for s in shares], width, label=kind, color=COLOURS[kind])
    left.set(xlabel="block", ylabel="kept channels, %", ylim=(0, 115), yticks=range(0, 101, 20), xticks=range(blocks))
    left.set_title(f"kept channels ({100 * report['trained']['sparsity']:.1f} % of block parameters removed)")
    left.legend(ncols=len(kept), fontsize=8, loc="upper center")
    shapes = list(report["latency"])
    for i, (name, colour) in enumerate((("dense", "#999999"), ("compact", "#0072B2"))):
        values = [1e3 * report["latency"][s][name] for s in shapes]
        bars = right.bar([k + (i - 0.5) * 0.38 for k in range(len(shapes))], values, 0.36, label=name, color=colour)
        right.bar_label(bars, fmt="%.1f", fontsize=8)
    right.set(xticks=range(len(shapes)), ylabel="latency, ms, 1 thread")
    right.set_xticklabels([s.replace("x", " x ") for s in shapes])
    right.set_title(", ".join(f"{report['latency'][s]['speedup']:.2f} x" for s in shapes))
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
