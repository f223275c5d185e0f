"""prunekern bench, demo and info: what runs here, and how fast"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .errors import reading
from .fits import check_positive
from .options import Activations, Out, Threads, Weights, app, console, set_threads


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    weights: Weights = None,
    activations: Activations = "auto",
    shapes: Annotated[str, typer.Option(help="batch x tokens, with commas between.")] = "1x128,8x128",
    threads: Annotated[int, typer.Option(help="Threads of torch and the C++ kernels; 0: torch's default.")] = 1,
    seconds: Annotated[float, typer.Option(help="About how long to measure each shape.")] = 5.0,
) -> None:
    """Time a compact model beside its dense twin (same config, random weights), interleaved in one process."""
    import torch

    from .. import _native
    from ..compacting.checkpoint import load, weights_of
    from ..compacting.latency import dense_twin, latency
    from ..compacting.plan import plan as plan_of

    try:
        parsed = [tuple(int(n) for n in s.split("x")) for s in shapes.split(",")]
        if any(len(s) != 2 or min(s) < 1 for s in parsed):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"--shapes must look like 1x128,8x128 (got {shapes!r})") from None
    check_positive(seconds=seconds)
    set_threads(threads)
    threads = torch.get_num_threads()
    if not _native.available():
        console.print(f"[yellow]warning:[/] {_native.why_not()}")
    with reading(model):
        small = load(model, weights, activations)
    plan = plan_of(small)
    ideal = plan.dense_macs() / plan.macs() if plan.macs() else float("inf")
    held = weights_of(small)
    table = Table(title=f"{model}, {held} weights, {threads} thread(s); ideal {ideal:.2f} x by multiply-adds")
    for column in ("batch x tokens", "dense ms", "compact ms", "speed-up", "of ideal"):
        table.add_column(column, justify="right")
    dense = dense_twin(small)
    for batch, tokens in parsed:
        with console.status(f"timing {batch} x {tokens}"):
            t = latency({"dense": dense, "compact": small}, batch, tokens, seconds, threads)
        speedup = t["dense"] / t["compact"]
        cells = (
            f"{1e3 * t['dense']:.2f}",
            f"{1e3 * t['compact']:.2f}",
            f"{speedup:.2f}",
            f"{100 * speedup / ideal:.0f} %",
        )
        table.add_row(f"{batch} x {tokens}", *cells)
    console.print(table)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="mini-distilbert, mini-bert or mini-roberta.")] = "mini-distilbert",
    sparsity: Annotated[float, typer.Option(help="Share of the block parameters to remove, in [0, 1).")] = 0.25,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Fine-tune a real encoder on real sentences, prune it, reload it in a new process and time it."""
    from ..demo.run import run

    set_threads(threads)
    run(out, model, sparsity, seed, console)


@app.command()
def info() -> None:
    """What prunekern runs on here, and how fast one core is."""
    from ..machine.info import info as collect

    with console.status("measuring"):
        facts = collect(measure=True)
    warnings, units = facts.pop("warnings"), {"fp32_peak": " GFLOP/s, one core", "read_bandwidth": " GB/s, one core"}
    units |= dict.fromkeys(("bf16_peak", "int8_peak"), " G operations/s, one core")
    table = Table(show_header=False)
    for name, value in facts.items():
        if value is not None:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), text + units.get(name, ""))
    console.print(table)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}")
