"""The command `prunekern`: train, compact, export, eval, bench, demo, info."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

# Option types that several commands share.
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
TaskName = Annotated[
    str | None,
    typer.Option(help="reviews, topics, tweets, wikipedia, or a GLUE task: mrpc rte sst2 mnli cola qnli qqp stsb."),
]
Data = Annotated[
    Path | None, typer.Option(help="Local .jsonl, .csv, .tsv, .parquet, or .txt of running text, instead of --task.")
]
Text = Annotated[str | None, typer.Option(help="Text column of --data; two with a comma between for pairs.")]
Label = Annotated[str | None, typer.Option(help="Label column of --data.")]
Split = Annotated[Path | None, typer.Option(help="A file of its own for this split of --data.")]
MaxLength = Annotated[int, typer.Option(help="Tokens a text is cut to.")]
Weights = Annotated[str, typer.Option(help="How a compact model holds its block weights: fp32, bf16 or int8.")]
Threads = Annotated[int, typer.Option(help="Threads of torch and the C++ kernels; 0 leaves torch's default.")]


def _task(task: str | None, data: Path | None, text: str | None, label: str | None, validation, test):
    from . import tasks

    if (task is None) == (data is None):
        raise typer.BadParameter("give either --task or --data")
    if task is not None:
        if any(o is not None for o in (text, label, validation, test)):
            raise typer.BadParameter("--text, --label, --validation and --test go with --data")
        return tasks.get(task)
    columns = None if text is None else tuple(t.strip() for t in text.split(","))
    columns = columns[0] if columns and len(columns) == 1 else columns
    return tasks.get(data, text=columns, label=label, validation=validation, test=test)


def _threads(count: int) -> None:
    import torch

    if count < 0:
        raise typer.BadParameter(f"--threads must be at least 0 (got {count})")
    if count:
        torch.set_num_threads(count)


@app.command()
def train(
    model: Annotated[
        str, typer.Option(help="Folder or hub name of the dense model; or a demo model: mini-distilbert.")
    ],
    out: Out,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    validation: Split = None,
    test: Split = None,
    sparsity: Annotated[float, typer.Option(help="Share of the block linears to remove, in [0, 1).")] = 0.25,
    cost: Annotated[str, typer.Option(help="What the share is of: params or macs.")] = "params",
    preset: Annotated[str, typer.Option(help="full: every block linear; paper: query and value only.")] = "full",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    align: Annotated[int, typer.Option(help="Kept channels of a layer come in multiples of this.")] = 1,
    epochs: float = 3.0,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps; -1: by --epochs.")] = -1,
    batch_size: int = 8,
    lr: Annotated[
        float | None, typer.Option(help="Of adapters and head, falling linearly to zero: 5e-4; preset paper: 5e-5.")
    ] = None,
    final_lr: Annotated[
        float | None, typer.Option(help="Constant rates instead: --lr in stage one, this in stage two.")
    ] = None,
    mask_lr: Annotated[float | None, typer.Option(help="Of mask logits: 5e-2; preset paper: 2e-2.")] = None,
    stage_one: Annotated[
        float | None, typer.Option(help="Share of the steps before the masks are final: 0.65; preset paper: 0.6.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="learned; or stock: every block alike, and OUT/stock loads without prunekern.")
    ] = "learned",
    max_length: MaxLength = 128,
    save_steps: int = 500,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUT's newest checkpoint.")] = False,
    threads: Threads = 0,
) -> None:
    """Fine-tune with DoRA and masks, remove what they prune, save OUT/compact, OUT/adapter, OUT/report.json, .png."""
    from .config import PruneConfig
    from .curves import plot
    from .demo.models import MODEL_NAMES, demo_model
    from .recipe import TrainOptions, evaluate, fine_tune, finish, load_dense, write_report

    _threads(threads)
    config = PruneConfig(
        rank=rank, alpha=alpha, dropout=dropout, preset=preset, sparsity=sparsity, cost=cost, align=align, seed=seed
    )
    options = TrainOptions(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=lr if lr is not None else 5e-5 if preset == "paper" else 5e-4,
        final_learning_rate=final_lr,
        mask_learning_rate=mask_lr,
        rule=rule,
        stage_one=stage_one,
        max_length=max_length,
        save_steps=save_steps,
        seed=seed,
    )
    data_task = _task(task, data, text, label, validation, test)
    dense, tokenizer = load_dense(str(demo_model(model)) if model in MODEL_NAMES else model, data_task, seed)
    pruner, trained = fine_tune(dense, tokenizer, data_task, config, options, out, resume, console)
    masked, _ = evaluate(pruner.model, tokenizer, data_task, max_length, console=console)
    small = finish(pruner, tokenizer, out, rule)
    compact, _ = evaluate(small, tokenizer, data_task, max_length, console=console)
    plan = pruner.plan()
    write_report(
        out,
        task=data_task.name,
        model=model,
        config=config,
        options=options,
        trained=trained,
        score={"masked": masked, "compact": compact},
        block_params={"compact": plan.params(), "dense": plan.dense_params()},
    )
    plot(trained["history"], trained, out / "report.png")
    table = Table(title=f"{data_task.name}: {100 * trained['sparsity']:.2f} % of the block {cost} removed")
    for column in ("kind", "kept", "of"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, (kept, of) in trained["by_kind"].items():
        table.add_row(kind.replace("_", " / "), f"{kept:,}", f"{of:,}")
    console.print(table)
    metric, split = data_task.metric, data_task.score_split
    before, after = (data_task.show(score[metric]) for score in (masked, compact))
    console.print(f"{split} {metric}: {before} before removal, {after} after")
    console.print(f"{out / 'compact'}  {out / 'adapter'}  {out / 'report.json'}  {out / 'report.png'}")


@app.command()
def compact(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    adapter: Annotated[Path, typer.Argument(help="Folder written by train (OUT/adapter) or save_adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder for the compact model.")],
) -> None:
    """Merge a trained adapter into its base model and remove what its masks prune, one linear in memory at a time."""
    from .demo.models import MODEL_NAMES, demo_model
    from .streaming import compact_files

    source = Path(demo_model(base) if base in MODEL_NAMES else base)
    if source.is_dir() and not list(source.glob("*.bin")):
        plan = compact_files(source, adapter, out, console=console)
    else:  # a hub name, or .bin weights: through memory
        from .adapter import load_adapter, load_base
        from .checkpoint import save
        from .compact import compact as make_compact

        dense = load_base(base, adapter)
        plan = load_adapter(dense, adapter).plan()
        save(make_compact(dense), out)
    console.print(f"{out}: {plan.params():,} of {plan.dense_params():,} block parameters kept")


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a compact (or dense) model with its tokenizer.")],
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    label: Label = None,
    validation: Split = None,
    test: Split = None,
    max_length: MaxLength = 128,
    weights: Weights = "fp32",
    threads: Threads = 0,
) -> None:
    """Score a saved model on a task."""
    from transformers import AutoTokenizer

    from . import hf  # noqa: F401  (compact folders load too)
    from .checkpoint import set_weights
    from .recipe import evaluate
    from .tasks import Task

    _threads(threads)
    data_task = _task(task, data, text, label, validation, test)
    loaded, found = data_task.model_class().from_pretrained(model, output_loading_info=True)
    if found["missing_keys"]:  # transformers draws them at random: a score of that would be a coin toss
        missing = min(found["missing_keys"])
        raise ValueError(f"{model}: has no tensor {missing!r}; it was not trained for a task like {data_task.name}")
    loaded = set_weights(loaded, weights)
    if isinstance(data_task, Task) and loaded.config.num_labels != data_task.num_labels:
        raise ValueError(f"{model}: has {loaded.config.num_labels} labels, {data_task.name} has {data_task.num_labels}")
    metrics, _ = evaluate(loaded, AutoTokenizer.from_pretrained(model), data_task, max_length, console=console)
    for name, value in metrics.items():
        console.print(f"{data_task.name}, {data_task.score_split}: {name} {data_task.show(value)}")


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    weights: Weights = "fp32",
    shapes: Annotated[str, typer.Option(help="batch x tokens, with commas between.")] = "1x128,8x128",
    threads: Annotated[int, typer.Option(help="Threads of torch and the C++ kernels.")] = 1,
    seconds: Annotated[float, typer.Option(help="About how long to measure each shape.")] = 5.0,
) -> None:
    """Time a compact model beside its dense twin (same config, random weights), interleaved in one process."""
    from .checkpoint import load
    from .measure import dense_twin, latency
    from .plan import plan as plan_of

    try:
        parsed = [tuple(int(n) for n in s.split("x")) for s in shapes.split(",")]
        if any(len(s) != 2 or min(s) < 1 for s in parsed):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"--shapes must look like 1x128,8x128 (got {shapes!r})") from None
    small = load(model, weights)
    plan = plan_of(small)
    ideal = plan.dense_macs() / plan.macs() if plan.macs() else float("inf")
    table = Table(title=f"{model}, {weights} weights, {threads} thread(s); ideal {ideal:.2f} x by multiply-adds")
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


@app.command("export")
def export_command(
    model: Annotated[Path, typer.Argument(help="Folder of a compact model.")],
    out: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    opset: Annotated[int, typer.Option(help="ONNX operator set, 18 to 23.")] = 18,
    with_past: Annotated[bool, typer.Option("--with-past", help="Decoders: caches as inputs and outputs.")] = False,
) -> None:
    """Write a compact model as an ONNX file of plain operators, in fp32."""
    from .checkpoint import load
    from .export import export_onnx

    try:
        export_onnx(load(model), out, opset, with_past)
    except ImportError as error:  # onnx is an extra
        raise ValueError(error) from None
    console.print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, opset {opset}")


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    model: Annotated[str, typer.Option(help="mini-distilbert, mini-bert or mini-roberta.")] = "mini-distilbert",
    sparsity: Annotated[float, typer.Option(help="Share of the block parameters to remove, in [0, 1).")] = 0.25,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Fine-tune a real encoder on real sentences, prune it, reload it in a new process and time it."""
    from .demo.run import run

    _threads(threads)
    run(out, model, sparsity, seed, console)


@app.command()
def info() -> None:
    """What prunekern runs on here, and how fast one core is."""
    from .info import info as collect

    with console.status("measuring"):
        facts = collect(measure=True)
    warnings, units = facts.pop("warnings"), {"fp32_peak": " GFLOP/s, one core", "read_bandwidth": " GB/s, one core"}
    table = Table(show_header=False)
    for name, value in facts.items():
        if value is not None:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(name.replace("_", " "), text + units.get(name, ""))
    console.print(table)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def _quiet() -> None:
    """One progress bar is ours; those of transformers and datasets, and their load reports, stay off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns at every fork otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and status 2; the rest keeps its traceback."""
    from .tasks.fetch import FetchError

    _quiet()
    try:
        app()
    except (ValueError, OSError, FloatingPointError, FetchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
