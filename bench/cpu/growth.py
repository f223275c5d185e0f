"""Does time fall with the arithmetic that is removed, all the way down?

    python -m bench.cpu.growth                # DistilBERT-base shape, 1 x 128 and 8 x 128 tokens, one thread, 5 minutes
    python -m bench.cpu.growth --shapes 1x128 --seconds 20

Ragged plans keep 1.0, 0.9 ... 0.1 of the block linears' multiply-adds (1.0: our kernels on a model with nothing
removed). Times of the compact models are compared with a straight line; at 0 it should meet what pruning cannot touch.
Two models bracket that: `empty` has no channel left in any block (embeddings, LayerNorms, head, Python), `heads` keeps
one query/key and one value channel a head, and so has the softmax of every head as well, which stays as long as its
head does. Beside them eager PyTorch: dense, and plainly sliced with the same plans. All take turns in one process,
minima count; answers are compared with float64 first.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy
import torch
from torch import nn

import prunekern as pk
from bench.common import peers_models, progress, report, shapes, sliced
from bench.common.answers import check_logits
from prunekern.machine.measure import interleaved, threads

SHARES = [round(0.1 * i, 1) for i in range(10, 0, -1)]
MODEL = "DistilBERT-base"
# (% of model size removed, % of inference time saved) of the paper's DistilBERT on eight GLUE tasks, one A5000.
PAPER = [(18, 15), (21, 16.2), (21, 14.2), (17, 11.9), (15, 11.6), (13, 9.6), (15, 10.9), (16, 15)]


def nearly_nothing(dense: nn.Module, channels_per_head: int) -> tuple[nn.Module, pk.Plan]:
    """(compact model, plan) without any channel but the first `channels_per_head` of each head's q/k and v."""
    attached = copy.deepcopy(dense)
    pruner = pk.attach(attached, pk.PruneConfig())
    head_dim = dense.config.hidden_size // dense.config.num_attention_heads
    for name, mask in pruner.masks.items():
        mask.logits.data.fill_(-1.0)
        if name.endswith(("attention.q_lin", "attention.v_lin")):
            mask.logits.data.view(-1, head_dim)[:, :channels_per_head] = 1.0
    return pk.compact(attached), pk.plan(attached)


def contestants(dense: nn.Module) -> tuple[dict, dict]:
    """(models by (kind, share), share of multiply-adds kept by the same keys), answers checked on 1 x 128."""
    ids, mask = shapes.inputs(1, 128)
    made, kept = {("eager", 1.0): dense}, {("eager", 1.0): 1.0}
    plans = {("compact", share): shapes.ragged(dense, 1 - share, cost="macs") for share in SHARES}
    plans["empty", 0.0] = nearly_nothing(dense, 0)
    plans["heads", 0.0] = nearly_nothing(dense, 1)
    for (kind, share), (small, plan) in plans.items():
        group = {(kind, share): small}
        if kind == "compact":
            group["sliced eager", share] = sliced.sliced(dense, plan)
        exact = sliced.masked(dense, plan)(ids, attention_mask=mask).logits
        for key, model in group.items():
            model.distilbert.embeddings = dense.distilbert.embeddings  # 94 MB each
            check_logits(f"{key[0]} {share}", model(ids, attention_mask=mask).logits, exact)
            made[key], kept[key] = model, plan.macs() / plan.dense_macs()
        progress.say(f"  {kind}, {kept[kind, share]:.3f} of the multiply-adds: answer right")
    return made, kept


def growth(made: dict, kept: dict, shape: tuple[int, int], seconds: float) -> tuple[list[dict], dict]:
    """(one row per share, the straight line and what it meets) for one batch x tokens."""
    ids, mask = shapes.inputs(*shape)
    calls = {key: peers_models.eager(model, ids, mask, 1) for key, model in made.items()}
    with progress.bar("  {} x {} tokens".format(*shape)) as tell:
        ms = interleaved(calls, seconds, progress=tell)
    ms = {key: 1e3 * s for key, s in ms.items()}
    x = numpy.array([kept["compact", share] for share in SHARES])
    y = numpy.array([ms["compact", share] for share in SHARES])
    slope, intercept = numpy.polyfit(x, y, 1)
    own = ms["compact", 1.0]
    rows = [
        {
            "batch_x_tokens": "{} x {}".format(*shape),
            "kept": round(float(part), 3),
            "compact_ms": round(time, 2),
            "line_ms": round(float(intercept + slope * part), 2),
            "off_%_of_whole": round(100 * float(time - intercept - slope * part) / own, 2),
            "sliced_eager_ms": round(ms["sliced eager", share], 2),
            "eager_dense_ms": round(ms["eager", 1.0], 2),
        }
        for share, part, time in zip(SHARES, x, y.tolist(), strict=True)
    ]
    fit = {
        "batch_x_tokens": "{} x {}".format(*shape),
        "own_dense_ms": round(own, 2),
        "line_at_1_ms": round(float(slope + intercept), 2),
        "line_at_0_ms": round(float(intercept), 2),
        "heads_ms": round(ms["heads", 0.0], 2),
        "empty_ms": round(ms["empty", 0.0], 2),
        "largest_off_%": max(abs(row["off_%_of_whole"]) for row in rows),
        "R2": round(float(numpy.corrcoef(x, y)[0, 1] ** 2), 5),
    }
    return rows, fit


def picture(rows: list[dict], fits: list[dict], path: Path) -> None:
    """One panel per batch x tokens: milliseconds over the share of multiply-adds kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(fits), figsize=(5.2 * len(fits), 4.4), squeeze=False)
    for axis, fit in zip(axes[0], fits, strict=True):
        group = [row for row in rows if row["batch_x_tokens"] == fit["batch_x_tokens"]]
        kept, eager = [row["kept"] for row in group], group[0]["eager_dense_ms"]
        axis.axhline(eager, color="0.6", linestyle=":", label="eager, dense")
        axis.plot(kept, [row["sliced_eager_ms"] for row in group], "s", color="0.5", label="eager, plainly sliced")
        axis.plot([0, 1], [fit["line_at_0_ms"], fit["line_at_1_ms"]], color="tab:red", label="straight line")
        axis.plot(kept, [row["compact_ms"] for row in group], "o", color="tab:red", label="prunekern, compact")
        axis.plot([0], [fit["heads_ms"]], "^", color="tab:blue", label="one channel a head left", clip_on=False)
        axis.plot([0], [fit["empty_ms"]], "v", color="tab:blue", label="no channel left", clip_on=False)
        paper = [(1 - size / 100, eager * (1 - time / 100)) for size, time in PAPER]
        axis.plot(*zip(*paper, strict=True), "x", color="tab:green", label="paper (share of model size, times eager)")
        axis.set(xlim=(0, 1.03), ylim=(0, None), xlabel="share of the blocks' multiply-adds kept", ylabel="ms")
        axis.set_title(f"{MODEL}, {fit['batch_x_tokens']} tokens, one thread", fontsize="medium")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3 if len(fits) > 1 else 2, loc="lower center", fontsize="small")
    figure.tight_layout(rect=(0, 0.12 if len(fits) > 1 else 0.18, 1, 1))
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x128,8x128", help="batch x tokens")
    parser.add_argument("--seconds", type=float, default=90.0, help="about how long to measure each shape")
    parser.add_argument("--out", default="growth")
    args = parser.parse_args()
    rows, fits = [], []
    with threads(1):
        made, kept = contestants(shapes.dense_model(MODEL))
        for text in args.shapes.split(","):
            new, fit = growth(made, kept, tuple(int(n) for n in text.split("x")), args.seconds)
            rows += new
            fits.append(fit)
    report.table(f"{MODEL}, fp32, one thread: time over the share of multiply-adds kept", rows)
    report.table("the straight line, and what it should meet at 1 and at 0", fits)
    path = report.write(args.out, fits=fits, rows=rows, paper_size_time=PAPER, args=vars(args))
    picture(rows, fits, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
