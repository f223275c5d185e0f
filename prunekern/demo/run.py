"""The demo: fine-tune, prune, remove, save, reload in a new process, time, and show it all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import tasks
from ..compacting.latency import latency
from ..pruning.config import PruneConfig
from ..pruning.pruner import Pruner
from ..tasks import AnyTask
from ..training.recipe import TrainOptions, evaluate, fine_tune, finish, load_dense, write_report
from .models import DEFAULT_MODEL, demo_model

# Short enough for 10 minutes on two cores: adapters learn at 40 x the paper's rate, over 1.5 epochs.
OPTIONS = TrainOptions(
    epochs=1.5,
    batch_size=32,
    learning_rate=2e-3,
    warmup_steps=15,
    max_length=64,
)
SHAPES = ((1, 128), (8, 128))  # batch x tokens


def run(
    out: Path,
    model: str = DEFAULT_MODEL,
    sparsity: float = 0.25,
    seed: int = 0,
    console: Console | None = None,
    options: TrainOptions = OPTIONS,
    seconds: float = 6.0,
) -> dict[str, Any]:
    """Everything, into the folder `out`: compact/, dense/, adapter/, report.json, report.png. Returns the report.

    seconds: how long the models are timed, of each shape.
    """
    from .plot import plot

    console = console or Console()
    start = time.perf_counter()
    options = replace(options, seed=seed)
    config = PruneConfig(sparsity=sparsity, seed=seed)
    console.print(f"[bold]1[/] {model} and movie-review sentences: fetching, checking, converting")
    folder, task = demo_model(model), tasks.get("reviews")
    dense, tokenizer = load_dense(str(folder), task, seed)
    dense.save_pretrained(out / "dense")
    console.print(f"[bold]2[/] fine-tuning with DoRA and masks on {len(task.splits['train']):,} sentences")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of an earlier demo
    pruner, trained = fine_tune(dense, tokenizer, task, config, options, out, console=console)
    before, masked_logits = evaluate(pruner.model, tokenizer, task, options.max_length, console=console)
    console.print(f"[bold]3[/] removing {100 * trained['sparsity']:.2f} % of the block parameters, saving")
    finish(pruner, tokenizer, out)
    (out / "masked_logits.json").write_text(json.dumps({"logits": masked_logits.tolist()}))
    console.print("[bold]4[/] a new process loads the compact model, scores it and times it beside the dense one")
    fresh = _in_new_process(out, options.max_length, seconds)
    (out / "masked_logits.json").unlink()
    report = _report(pruner, task, trained, before, fresh, out)
    report["seconds"] = time.perf_counter() - start
    write_report(out, **report, config=config, options=options, model=model)
    plot(report, pruner.plan(), out / "report.png")
    show(report, console)
    console.print(f"{out / 'report.json'}  {out / 'report.png'}  {out / 'compact'}  ({report['seconds']:.0f} s in all)")
    return report


def _in_new_process(out: Path, max_length: int, seconds: float) -> dict[str, Any]:
    arguments = [str(out), str(max_length), str(seconds)]
    result = subprocess.run(
        [sys.executable, "-m", "prunekern.demo.run", *arguments], stdout=subprocess.PIPE, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"demo: the process that reloads {out / 'compact'} ended with status {result.returncode}")
    fresh: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return fresh


def reload_and_time(out: Path, max_length: int, seconds: float) -> dict[str, Any]:
    """In the new process: accuracy of the reloaded compact model, its difference to the masked one, latencies."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from ..compacting.checkpoint import load

    compact, tokenizer = load(out / "compact"), AutoTokenizer.from_pretrained(out / "compact")
    dense = AutoModelForSequenceClassification.from_pretrained(out / "dense").eval()
    console = Console(stderr=True)
    metrics, logits = evaluate(compact, tokenizer, tasks.get("reviews"), max_length, console=console)
    masked = torch.tensor(json.loads((out / "masked_logits.json").read_text())["logits"], device="cpu")
    difference = ((logits - masked).abs().max() / masked.abs().max()).item()
    same = (logits.argmax(1) == masked.argmax(1)).float().mean().item()
    times = {}
    for batch, tokens in SHAPES:
        with console.status(f"timing {batch} x {tokens}"):
            times[f"{batch}x{tokens}"] = latency({"dense": dense, "compact": compact}, batch, tokens, seconds=seconds)
    return {"metrics": metrics, "difference": difference, "same_predictions": same, "seconds": times}


def _report(
    pruner: Pruner,
    task: AnyTask,
    trained: dict[str, Any],
    before: dict[str, float],
    fresh: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    plan = pruner.plan()
    outside = sum(p.numel() for p in pruner.model.parameters())
    adapters = sum(m.A.numel() + m.B.numel() + m.magnitude.numel() for m in pruner.layers.values())
    outside -= adapters + sum(m.logits.numel() for m in pruner.masks.values())  # the dense model's own
    if pruner.shrunk:
        outside += plan.dense_params() - plan.params()
    ideal = plan.dense_macs() / plan.macs()
    report = {
        "task": task.name,
        "metric": task.metric,
        "parameters": {"dense": outside, "compact": outside - plan.dense_params() + plan.params()},
        "bytes": {n: (out / n / "model.safetensors").stat().st_size for n in ("dense", "compact")},
        "score": {"masked": before[task.metric], "compact": fresh["metrics"][task.metric]},
        "difference": fresh["difference"],
        "same_predictions": fresh["same_predictions"],
        "ideal_speedup": ideal,
        "latency": {},
        "trained": trained,
    }
    for shape, seconds in fresh["seconds"].items():
        speedup = seconds["dense"] / seconds["compact"]
        report["latency"][shape] = {**seconds, "speedup": speedup, "of_ideal": speedup / ideal}
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """One table: what it was, what it is."""
    table = Table(
        title=f"{report['task']}: {100 * report['trained']['sparsity']:.2f} % of the block parameters removed"
    )
    table.add_column("")
    for column in ("dense / masked", "compact", "ratio"):
        table.add_column(column, justify="right")
    p, b, s = report["parameters"], report["bytes"], report["score"]
    table.add_row("parameters", f"{p['dense']:,}", f"{p['compact']:,}", f"{p['compact'] / p['dense']:.3f}")
    size = [f"{b[n] / 2**20:.1f} MiB" for n in ("dense", "compact")]
    table.add_row("file on disk", *size, f"{b['compact'] / b['dense']:.3f}")
    scores = [f"{100 * s[n]:.2f} %" for n in ("masked", "compact")]
    table.add_row(f"test {report['metric']} before / after removal", *scores, f"{s['compact'] / s['masked']:.3f}")
    for shape, row in report["latency"].items():
        label = f"latency {shape.replace('x', ' x ')}, 1 thread"
        times = [f"{1e3 * row[n]:.2f} ms" for n in ("dense", "compact")]
        table.add_row(label, *times, f"{row['speedup']:.2f} x faster, {100 * row['of_ideal']:.0f} % of ideal")
    console.print(table)
    console.print(
        f"ideal speed-up by multiply-adds: {report['ideal_speedup']:.2f} x; logits before / after removal differ by "
        f"{report['difference']:.1e} of the largest, predictions agree on {100 * report['same_predictions']:.2f} %"
    )


if __name__ == "__main__":
    print(json.dumps(reload_and_time(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
