"""README's picture: what is kept of each layer kind by block, and latency beside the peers. Nothing is measured here.

    python -m bench.headline        # bench/results/headline.png, from demo.json (make demo) and models.json

Left, the plan that the demo's training ended with; right, the compact model of bench.cpu.models beside its peers.
"""

from __future__ import annotations

import argparse
import re

from bench.common import report

# Okabe and Ito's colours, which the colour-blind tell apart; names of layers by what DistilBERT calls them.
BLUE, ORANGE, GREY, LIGHT = "#0072B2", "#E69F00", "#999999", "#F2F2F2"
KINDS = {
    "attention.q_lin": "query, key",
    "attention.v_lin": "value",
    "attention.out_lin": "attention out",
    "ffn.lin1": "FFN in",
    "ffn.lin2": "FFN out",
}
MODEL, SHAPES = "DistilBERT-base", ("1 x 128", "8 x 128")


def kept_shares(kept: dict[str, list[int]]) -> list[list[float]]:
    """kept: [kept, all] channels by carrier. A row a kind, a column a block, % of the channels."""
    shares: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    for carrier, (some, every) in kept.items():
        block, kind = re.search(r"\.layer\.(\d+)\.(.+)$", carrier).groups()
        shares[kind][int(block)] = 100 * some / every
    return [[by_block[i] for i in sorted(by_block)] for by_block in shares.values()]


def bars_of(models: dict, shape: str) -> list[tuple[str, float, str]]:
    """(label, milliseconds, colour) from the top: dense peers, the best of the sliced ones, ours in fp32."""
    of_shape = [r for r in models["rows"] if (r["model"], r["batch_x_tokens"]) == (MODEL, shape)]
    rows = [r for r in of_shape if r.get("precision", "fp32") == "fp32"]
    (ours,) = (
        r["compact_ms"]
        for r in models["summary"]
        if (r["model"], r["batch_x_tokens"], r["weights"]) == (MODEL, shape, "fp32")
    )
    best = min(rows, key=lambda r: r["sliced_ms"])
    return [
        *((r["peer"], r["dense_ms"], GREY) for r in rows),
        (best["peer"], best["sliced_ms"], ORANGE),
        ("prunekern", ours, BLUE),
    ]


def draw(demo: dict, models: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    figure = plt.figure(figsize=(9, 4.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25), wspace=0.03)
    heat(left, kept_shares(demo["trained"]["kept"]), LinearSegmentedColormap.from_list("kept", (LIGHT, BLUE)))
    gone = f"{100 * demo['trained']['sparsity']:.0f} % of the block parameters removed"
    left.suptitle(f"Channels kept, %, trained on {demo['task']},\n{gone}", fontsize=9.5)
    axes = right.subplots(len(SHAPES), 1)
    for axis, shape in zip(axes, SHAPES, strict=True):
        latency(axis, bars_of(models, shape), shape)
    share, threads = models["args"]["share"], models["args"]["threads"]
    what = f"{MODEL} shape, random weights, {100 * share:.0f} % removed, fp32, {threads} thread{'s' * (threads > 1)}:"
    right.suptitle(f"{what}\nmilliseconds, and ratio to the compact model", fontsize=9.5)
    legend = [Patch(color=GREY, label="dense"), Patch(color=ORANGE, label="fastest peer, same channels cut out")]
    legend.append(Patch(color=BLUE, label="compact"))
    right.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False, handlelength=1)
    figure.savefig(path, dpi=200, facecolor="white")
    plt.close(figure)


def heat(figure, rows: list[list[float]], colours) -> None:
    axis = figure.subplots()
    axis.imshow(rows, cmap=colours, vmin=20, vmax=100, aspect="auto")
    for i, row in enumerate(rows):
        for j, share in enumerate(row):
            axis.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=9, color="w" if share > 75 else "k")
    axis.set_xticks(range(len(rows[0])), [f"{j + 1}" for j in range(len(rows[0]))])
    axis.set_yticks(range(len(rows)), KINDS.values())
    axis.set_xlabel("block, from the first to the last", fontsize=9)
    axis.tick_params(length=0, labelsize=9)
    axis.set_xticks([j - 0.5 for j in range(1, len(rows[0]))], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="minor", length=0)
    axis.spines[:].set_visible(False)


def latency(axis, bars: list[tuple[str, float, str]], shape: str) -> None:
    """Bars from the top, each with its time and how many times ours it takes."""
    ours = bars[-1][1]
    names, times, colours = zip(*bars, strict=True)
    drawn = axis.barh(range(len(bars)), times, 0.78, color=colours)  # by place: the sliced peer is there twice
    axis.set_yticks(range(len(bars)), names)
    told = [f"{t:.0f}" if t == ours else f"{t:.0f}   {t / ours:.2f} x" for t in times]
    for label, colour in zip(axis.bar_label(drawn, told, padding=3, fontsize=8.5), colours, strict=True):
        label.set_fontweight("bold" if colour == BLUE else "normal")
    axis.invert_yaxis()
    axis.margins(x=0.22)
    axis.set_ylabel(f"{shape} tokens", fontsize=9)
    axis.tick_params(axis="y", length=0, labelsize=8.5)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = report.RESULTS / "headline.png"
    draw(report.read("demo"), report.read("models"), path)
    print(f"wrote {path.relative_to(report.ROOT)}")


if __name__ == "__main__":
    main()
