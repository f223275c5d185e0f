"""Is a compact model faster than everything a user would run instead?

    python -m bench.cpu.models                     # two models, two shapes, 25 % removed, one thread; 9 minutes
    python -m bench.cpu.models --models DistilBERT-base --shapes 1x128 --peers eager,OpenVINO

Weights are random (they do not matter for speed); the plan is ragged: every mask loses its own number of channels,
chosen by random logits with a different mean in every layer. Peers run the dense model and the plainly sliced one
(bench/common/sliced.py) with the same kept counts. Answers first: everyone is compared with float64 eager, with removed
rows zeroed where the model is pruned. Then all of them take turns in one process and minima are compared. "ideal" is
the ratio of the block linears' multiply-adds. Rows of weights other than fp32 appear for every kind prunekern.load
knows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

import prunekern as pk
from bench.common import peers_models, progress, report, shapes, sliced
from bench.common.answers import LEAST_DECIBEL, check_logits, decibel
from prunekern.compacting import checkpoint
from prunekern.machine.measure import interleaved, threads


def kinds(small: nn.Module) -> dict[str, nn.Module]:
    """The compact model as a deployment gets it, saved and loaded: one for each way to hold its weights."""
    with tempfile.TemporaryDirectory() as folder:
        pk.save(small, Path(folder) / "compact")
        return {kind: pk.load(Path(folder) / "compact", weights=kind) for kind in checkpoint.WEIGHTS}


def race(dense: nn.Module, small: nn.Module, plan: pk.Plan, shape: tuple[int, int], args) -> tuple[dict, dict]:
    """(milliseconds by (who, what), SQNR in dB by weight kind). what: "dense", "sliced", or the weight kind if ours."""
    ids, mask = shapes.inputs(*shape)
    double = copy.deepcopy(dense).double()
    exact = {"dense": double(ids, attention_mask=mask).logits}
    exact["sliced"] = sliced.masked(dense, plan)(ids, attention_mask=mask).logits
    subjects = {"dense": dense, "sliced": sliced.sliced(dense, plan)}
    calls, noise = {}, {}
    for kind, model in kinds(small).items():
        call = peers_models.eager(model, ids, mask, args.threads)
        noise[kind] = decibel(call(), exact["sliced"])
        if kind == "fp32":
            check_logits("compact", call(), exact["sliced"])
        elif not noise[kind] >= LEAST_DECIBEL:
            raise SystemExit(f"compact {kind}: wrong answer ({noise[kind]:.1f} dB)")
        calls["compact", kind] = call
    for peer in args.peers:
        for what, model in subjects.items():
            start = time.perf_counter()
            call = peers_models.PEERS[peer](model, ids, mask, args.threads)
            check_logits(f"{peer}, {what}", call(), exact[what])
            calls[peer, what] = call
            progress.say(f"  {peer}, {what}: built in {time.perf_counter() - start:.0f} s, answer right")
    with progress.bar("  taking turns") as tell:
        seconds = interleaved(calls, args.seconds, progress=tell)
    return {key: 1e3 * s for key, s in seconds.items()}, noise


def rows_of(name: str, shape: tuple[int, int], ms: dict, peers: list[str]) -> list[dict]:
    """One row per peer: its times, ours over them."""
    ours, rows = ms["compact", "fp32"], []
    for peer in peers:
        row = {"model": name, "batch_x_tokens": "{} x {}".format(*shape), "peer": peer}
        row["dense_ms"], row["sliced_ms"] = ms[peer, "dense"], ms[peer, "sliced"]
        row |= {"x_dense": row["dense_ms"] / ours, "x_sliced": row["sliced_ms"] / ours}
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def summary_of(rows: list[dict], ms: dict, noise: dict, ideal: float) -> list[dict]:
    """One row per kind of weights: ours against the best dense and the best sliced peer."""
    best = {what: min(rows, key=lambda row: row[f"{what}_ms"]) for what in ("dense", "sliced")}
    summary = []
    for kind, decibels in noise.items():
        ours = ms["compact", kind]
        row = {k: rows[0][k] for k in ("model", "batch_x_tokens")} | {"weights": kind, "compact_ms": round(ours, 2)}
        for what in best:
            row[f"best_{what}"] = f"{best[what]['peer']} {best[what][f'{what}_ms']:.2f}"
            row[f"x_best_{what}"] = round(best[what][f"{what}_ms"] / ours, 3)
        summary.append(row | {"ideal": round(ideal, 3), "SQNR_dB": round(decibels, 1)})
    return summary


def picture(rows: list[dict], summary: list[dict], path: Path) -> None:
    """Bars: milliseconds of every peer, dense and sliced, and ours as lines; one panel per model and shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["batch_x_tokens"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        group = [row for row in rows if (row["model"], row["batch_x_tokens"]) == panel]
        for i, what in enumerate(("dense", "sliced")):
            places = [j + 0.4 * i for j in range(len(group))]
            axis.bar(places, [row[f"{what}_ms"] for row in group], 0.38, label=what, color=("0.75", "0.5")[i])
        ours = [row for row in summary if (row["model"], row["batch_x_tokens"]) == panel]
        for row, colour in zip(ours, ("tab:red", "tab:blue", "tab:green"), strict=False):
            axis.axhline(row["compact_ms"], color=colour, label=f"prunekern compact, {row['weights']}")
        axis.set_xticks([j + 0.2 for j in range(len(group))], [row["peer"] for row in group], rotation=25)
        axis.set_title("{}, {} tokens".format(*panel), fontsize="medium")
    axes[0, 0].set_ylabel("ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", fontsize="small")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    def listed(known):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            for name in names:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"must be of {', '.join(known)} (got {name!r})")
            return names

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=listed(shapes.MODELS), default=list(shapes.MODELS))
    parser.add_argument("--peers", type=listed(peers_models.PEERS), default=list(peers_models.PEERS))
    parser.add_argument("--share", type=float, default=0.25, help="of the block parameters to remove")
    parser.add_argument("--shapes", default="1x128,8x128", help="batch x tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long to measure each shape")
    parser.add_argument("--out", default="models")
    return parser.parse_args()


@torch.no_grad()  # not inference_mode: torch.compile freezes under no_grad only
def main() -> None:
    args = parse()
    disable_progress_bar()
    rows, summary = [], []
    for name in args.models:
        dense = shapes.dense_model(name)
        small, plan = shapes.ragged(dense, args.share)
        ideal = plan.dense_macs() / plan.macs()
        for text in args.shapes.split(","):
            progress.say(f"{name}, {text}")
            shape = tuple(int(n) for n in text.split("x"))
            with threads(args.threads):
                ms, noise = race(dense, small, plan, shape, args)
            new = rows_of(name, shape, ms, args.peers)
            rows += new
            summary += summary_of(new, ms, noise, ideal)
            torch.compiler.reset()  # gigabytes of packed weights
            gc.collect()
    report.table(f"fp32, {args.threads} thread(s): peers, and their time over that of the compact model", rows)
    report.table(f"compact model against the best peer, {args.share:.0%} of block parameters removed", summary)
    path = report.write(args.out, summary=summary, rows=rows, args=vars(args))
    picture(rows, summary, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
