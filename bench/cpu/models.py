"""Is a compact model faster than everything a user would run instead, in fp32, in bf16, in int8?

    make peers-venv                                # peers that are not in .venv: NNCF, CTranslate2, zentorch
    .venv-peers/bin/python -m bench.cpu.models     # two models, two shapes, 25 % removed, one thread; ~40 minutes
    python -m bench.cpu.models --precision int8 --models DistilBERT-base --shapes 1x128
    python -m bench.cpu.models --models DeBERTa-v3-base,ModernBERT-base --shapes 1x128 --out encoders
    python -m bench.cpu.models --quick             # a tiny model, every peer: does it run, are the answers right

Weights are random (they do not matter for speed); the plan is ragged: every mask loses its own number of channels,
chosen by random logits with a different mean in every layer. Peers run the dense model and the plainly sliced one
(bench/common/sliced.py) with the same kept counts, in the precision at hand. Answers first: everyone is compared with
float64 eager, with removed rows zeroed where the model is pruned; in fp32 to rounding, in bf16 and int8 by decibels of
the logits. Then all of them take turns in one process, ours in fp32 among them, and minima are compared. "ideal" is
the ratio of the block linears' multiply-adds. A peer that is not installed, or does not take a model, is named with
the reason. Best peers of int8 are those that round activations as they come; the one whose ranges are fixed
beforehand has a column of its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

import prunekern as pk
from bench.common import peers_models, progress, report, safe, shapes, sliced, tried
from bench.common.answers import check_logits, decibel
from bench.common.peers_models_narrow import LEAST_DECIBEL, PEERS, STATIC, Missing
from prunekern.machine.measure import interleaved, threads

COMPACT = "compact"


def kinds(small: nn.Module, precision: str) -> dict[str, nn.Module]:
    """The compact model as a deployment gets it, saved and loaded: in fp32, and in `precision`."""
    with tempfile.TemporaryDirectory() as folder:
        pk.save(small, Path(folder) / "compact")
        wanted = dict.fromkeys(("fp32", precision))
        return {kind: pk.load(Path(folder) / "compact", weights=kind, activations="auto") for kind in wanted}


def right(name: str, logits: torch.Tensor, exact: torch.Tensor, precision: str) -> float:
    """Decibels of the answer; SystemExit for a wrong one."""
    noise = decibel(logits.double(), exact)
    if precision == "fp32":
        check_logits(name, logits, exact)
    elif not noise >= LEAST_DECIBEL:
        raise SystemExit(f"{name}: wrong answer ({noise:.1f} dB)")
    return noise


class Race:
    """One model, shape and precision: who could run, how fast, how exactly.

    ms, noise: by (who, what). what: "dense" or "sliced", or the kind of weights where who is COMPACT; missing: why.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, plan: pk.Plan, shape: tuple[int, int], precision: str, args):
        self.precision = precision
        ids, mask = shapes.inputs(*shape)
        exact = {"dense": copy.deepcopy(dense).double()(ids, attention_mask=mask).logits}
        exact["sliced"] = sliced.masked(dense, plan)(ids, attention_mask=mask).logits
        models = {"dense": dense}
        if sliced.is_known(dense):
            models["sliced"] = sliced.sliced(dense, plan)
        self.calls, self.noise, self.missing, self.exact = {}, {}, {}, exact
        for kind, model in kinds(small, precision).items():
            call = peers_models.eager(model, ids, mask, args.threads)
            self.noise[COMPACT, kind] = right(f"compact {kind}", call(), exact["sliced"], kind)
            self.calls[COMPACT, kind] = call
        for peer, make in PEERS[precision].items():
            if args.peers and peer not in args.peers:
                continue
            kills = args.held is not None and precision != "fp32" and tried.dies(precision, peer)
            for what, model in models.items():
                start = time.perf_counter()
                try:
                    if kills:
                        raise Missing("kills its process on this CPU")
                    call = make(model, ids, mask, args.threads)
                    found = call()
                except Exception as why:  # a peer's own, of a model that it does not take
                    reason = str(why) if isinstance(why, Missing) else f"fails: {' '.join(str(why).split())[:200]}"
                    self.missing[peer, what] = reason
                    progress.say(f"  {peer}, {what}: {reason}")
                    continue
                self.noise[peer, what] = right(f"{peer}, {what}, {precision}", found, exact[what], precision)
                self.calls[peer, what] = call
                progress.say(f"  {peer}, {what}: built in {time.perf_counter() - start:.0f} s, answer right")

    def run(self, seconds: float) -> dict[tuple[str, str], float]:
        """Milliseconds of everyone, taking turns. Answers are checked again: a library that one peer loads has
        changed what another computed (zentorch CTranslate2's, both of which bring a oneDNN)."""
        with progress.bar("  taking turns") as tell:
            best = interleaved(self.calls, seconds, progress=tell)
        for (who, what), call in self.calls.items():
            kind = what if who == COMPACT else self.precision
            right(f"{who}, {what}, after the turns", call(), self.exact.get(what, self.exact["sliced"]), kind)
        return {key: 1e3 * s for key, s in best.items()}


def rows_of(name: str, shape: tuple[int, int], precision: str, ms: dict, noise: dict) -> list[dict]:
    """One row per peer: its times, over ours of the same precision, and the decibels of its dense model."""
    ours, rows = ms[COMPACT, precision], []
    for peer in dict.fromkeys(who for who, _ in ms if who != COMPACT):
        row = {"model": name, "batch_x_tokens": "{} x {}".format(*shape), "precision": precision, "peer": peer}
        times = {what: ms.get((peer, what)) for what in ("dense", "sliced")}
        row |= {f"{what}_ms": time for what, time in times.items()}
        row |= {f"x_{what}": None if time is None else time / ours for what, time in times.items()}
        row["SQNR_dB"] = round(noise[peer, "dense"], 1) if (peer, "dense") in noise else None
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def summary_of(rows: list[dict], precision: str, ms: dict, noise: dict, ideal: float) -> dict:
    """Ours against the best dense and the best sliced peer of its precision, and against ours in fp32."""
    ours = ms[COMPACT, precision]
    row = {k: rows[0][k] for k in ("model", "batch_x_tokens")} | {"weights": precision, "compact_ms": round(ours, 2)}
    for what in ("dense", "sliced"):
        timed = [r for r in rows if r[f"{what}_ms"] is not None and r["peer"] != STATIC]
        best = min(timed, key=lambda r: r[f"{what}_ms"], default=None)
        row[f"best_{what}"] = None if best is None else f"{best['peer']} {best[f'{what}_ms']:.2f}"
        row[f"x_best_{what}"] = None if best is None else round(best[f"{what}_ms"] / ours, 3)
    static = [r["dense_ms"] for r in rows if r["peer"] == STATIC]
    row["x_static"] = round(static[0] / ours, 3) if static and static[0] is not None else None
    row["x_fp32"] = round(ms[COMPACT, "fp32"] / ours, 3)
    return row | {"ideal": round(ideal, 3), "SQNR_dB": round(noise[COMPACT, precision], 1)}


def picture(rows: list[dict], summary: list[dict], path: Path) -> None:
    """Bars: milliseconds of every peer, dense and sliced, and ours as lines; a panel per model and shape, a line of
    panels per precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["batch_x_tokens"]) for row in rows))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    size = (3.6 * len(panels), 3.2 * len(precisions) + 0.4)
    figure, axes = plt.subplots(len(precisions), len(panels), figsize=size, squeeze=False)
    for line, precision in zip(axes, precisions, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            draw(axis, [r for r in rows if (r["model"], r["batch_x_tokens"], r["precision"]) == (*panel, precision)])
            for row in summary:
                if (row["model"], row["batch_x_tokens"], row["weights"]) == (*panel, precision):
                    axis.axhline(row["compact_ms"], color="tab:red", label="prunekern compact")
            axis.set_title("{}, {} tokens, {}".format(*panel, precision), fontsize="medium")
        line[0].set_ylabel("ms")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", fontsize="small")
    figure.tight_layout(rect=(0, 0.25 / size[1], 1, 1))
    figure.savefig(path, dpi=120)


def draw(axis, group: list[dict]) -> None:
    """One panel's bars; a peer that does not take the sliced model has none there."""
    for i, what in enumerate(("dense", "sliced")):
        places = [j + 0.4 * i for j in range(len(group))]
        axis.bar(places, [row[f"{what}_ms"] or 0 for row in group], 0.38, label=what, color=("0.75", "0.5")[i])
    axis.set_xticks([j + 0.2 for j in range(len(group))], [row["peer"] for row in group], rotation=25, ha="right")


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
    names = [*shapes.MODELS, *shapes.OTHERS, *shapes.TINY]
    parser.add_argument("--models", type=listed(names), default=list(shapes.MODELS), help=f"of {', '.join(names)}")
    known = [*dict.fromkeys(peer for of_one in PEERS.values() for peer in of_one)]
    parser.add_argument("--precision", default="all", choices=["all", *PEERS], help="of weights and arithmetic")
    parser.add_argument("--peers", type=listed(known), default=[], help=f"all of {', '.join(known)}")
    parser.add_argument("--share", type=float, default=0.25, help="of the block parameters to remove")
    parser.add_argument("--shapes", default="1x128,8x128", help="batch x tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long to measure each shape")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few turns: a test of the script")
    parser.add_argument("--out", default="models")
    args = parser.parse_args()
    if args.quick:
        args.models, args.shapes, args.seconds = list(shapes.TINY), "1x16", 0.2
    return args


@torch.no_grad()  # not inference_mode: torch.compile freezes under no_grad only
def main() -> None:
    args = parse()
    precisions = ["fp32", "int8", "bf16"] if args.precision == "all" else [args.precision]  # zentorch's last
    args.held = safe.without_amx_if_it_kills() if precisions != ["fp32"] else None
    disable_progress_bar()
    rows, summary, missing = [], [], []
    for precision, name, text in itertools.product(precisions, args.models, args.shapes.split(",")):
        progress.say(f"{name}, {text}, {precision}")
        dense, shape = shapes.dense_model(name), tuple(int(n) for n in text.split("x"))
        small, plan = shapes.ragged(dense, args.share)
        with threads(args.threads):
            race = Race(dense, small, plan, shape, precision, args)
            ms = race.run(args.seconds)
        new = rows_of(name, shape, precision, ms, race.noise)
        rows += new
        if new:
            summary.append(summary_of(new, precision, ms, race.noise, plan.dense_macs() / plan.macs()))
        missing += [
            {"model": name, "precision": precision, "peer": peer, "of": what, "why": why}
            for (peer, what), why in race.missing.items()
        ]
        del race
        torch.compiler.reset()  # gigabytes of packed weights
        gc.collect()
    if not rows:
        raise SystemExit("no peer could run: " + "; ".join(f"{m['peer']} {m['why']}" for m in missing))
    missing = [dict(entry) for entry in dict.fromkeys(tuple(m.items()) for m in missing)]  # once, not once a shape
    report.table(f"{args.threads} thread(s): peers, and their time over that of the compact model", rows)
    report.table(f"compact model against the best peer, {args.share:.0%} of block parameters removed", summary)
    if missing:
        report.table("not measured", missing)
    path = report.write(args.out, summary=summary, rows=rows, missing=missing, args=vars(args))
    picture(rows, summary, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
