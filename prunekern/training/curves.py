"""The picture of a training run: loss, share removed, flips, and what each kind of channel group keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Colour-blind safe (Okabe and Ito).
COLOURS = {"query_key": "#0072B2", "value": "#56B4E9", "ffn": "#E69F00", "residual": "#009E73"}


def draw(axes: Sequence[Any], history: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """Onto two axes: loss and share removed by step; flips a step, and the kept share by kind.

    history: entries of the Trainer's log with "step", "loss", "sparsity", and "flips", "kept/KIND" while masks move.
    report: what `Pruner.report` returns.
    """
    upper, lower = axes
    steps = [e["step"] for e in history]
    upper.plot(steps, [float(e["loss"]) for e in history], color="#999999", label="loss")
    upper.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    removed = upper.twinx()
    removed.plot(steps, [100 * float(e["sparsity"]) for e in history], color="#D55E00", label="removed")
    removed.set(ylabel="parameters removed, %", ylim=(0, max(5.0, 110 * report["target"])))
    upper.legend(*_together(upper, removed), fontsize=8, loc="lower left")
    moving = [e for e in history if "flips" in e]
    for kind, colour in COLOURS.items():
        points = [(e["step"], 100 * float(e[f"kept/{kind}"])) for e in moving if f"kept/{kind}" in e]
        if kind in report["by_kind"]:
            kept, of = report["by_kind"][kind]
            if steps and kept is not None:
                points.append((steps[-1], 100 * kept / of))
            lower.plot(*zip(*points, strict=True), color=colour, label=kind.replace("_", " / "))
    lower.set(xlabel="step", ylabel="kept channel groups, %", ylim=(0, 105))
    turned = lower.twinx()
    turned.plot([e["step"] for e in moving], [e["flips"] for e in moving], color="black", linewidth=0.7, label="flips")
    turned.set(ylabel="masks turned at that step", ylim=(0, None))
    lower.legend(*_together(lower, turned), fontsize=8)


def plot(history: Sequence[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """Write the picture to `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(axes, history, report)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _together(*axes: Any) -> tuple[list[Any], list[str]]:
    handles: list[Any] = []
    labels: list[str] = []
    for axis in axes:
        some = axis.get_legend_handles_labels()
        handles += some[0]
        labels += some[1]
    return handles, labels
