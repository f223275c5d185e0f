"""prunekern train"""

from __future__ import annotations

from typing import Annotated

import typer

from . import embeddings
from .errors import reading
from .fits import check_bf16, check_head, check_length, check_positive, say_cut
from .kinds import kinds_table
from .options import (
    Bf16,
    Choices,
    Data,
    Label,
    LabelColumns,
    LabelSeparator,
    MaxLength,
    Metric,
    Out,
    Regression,
    Split,
    TaskName,
    TaskType,
    Text,
    Threads,
    app,
    console,
    set_threads,
    task_of,
)


@app.command()
def train(
    model: Annotated[
        str, typer.Option(help="Folder or hub name of the dense model; or a demo model: mini-distilbert.")
    ],
    out: Out,
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    choices: Choices = None,
    label: Label = None,
    label_columns: LabelColumns = None,
    label_separator: LabelSeparator = None,
    task_type: TaskType = None,
    regression: Regression = None,
    metric: Metric = None,
    validation: Split = None,
    test: Split = None,
    sparsity: Annotated[float, typer.Option(help="Share of the block linears to remove, in [0, 1).")] = 0.25,
    cost: Annotated[str, typer.Option(help="What the share is of: params or macs.")] = "params",
    preset: Annotated[str, typer.Option(help="full: every block linear; paper: query and value only.")] = "full",
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    align: Annotated[int, typer.Option(help="Kept channels of a layer come in multiples of this, or all stay.")] = 1,
    epochs: float = 3.0,
    max_steps: Annotated[int, typer.Option(help="Optimiser steps; -1: by --epochs.")] = -1,
    batch_size: Annotated[int | None, typer.Option(help="8; of embeddings 16, and 8 of --kept-steps.")] = None,
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
        str,
        typer.Option(
            help="learned; heads: whole heads and widths of --align, by block; stock: every block alike, and OUT/stock "
            "loads without prunekern."
        ),
    ] = "learned",
    kept_steps: Annotated[
        int | None,
        typer.Option(help="Of embeddings: so many steps more, of the compact model in all that is kept; none."),
    ] = None,
    kept_lr: Annotated[float | None, typer.Option(help="Of these steps: 3e-4.")] = None,
    max_length: MaxLength = 128,
    save_steps: int = 500,
    seed: int = 0,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Calibrate OUT/compact for int8 or int4 weights with training texts; the choice is saved. "
            "Of embeddings: only score it so."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from OUT's newest checkpoint.")] = False,
    bf16: Bf16 = False,
    threads: Threads = 0,
) -> None:
    """Fine-tune with DoRA and masks, remove what they prune, save OUT/compact, OUT/adapter, OUT/report.json, .png."""
    import matplotlib  # noqa: F401  (what is missing must be known before training, not after)

    from ..demo.models import MODEL_NAMES, demo_model
    from ..pruning.config import PruneConfig
    from ..training import quantizing
    from ..training.curves import plot
    from ..training.recipe import TrainOptions, evaluate, fine_tune, finish, load_dense, write_report

    set_threads(threads)
    if not (max_steps > 0 or (max_steps == -1 and epochs > 0)):
        raise ValueError(f"--max-steps must be positive, or -1 and --epochs positive (got {max_steps} and {epochs})")
    quantizing.check_kind(quantize)
    embeds = task == embeddings.TASK
    check_positive(batch_size=batch_size, epochs=epochs, final_lr=final_lr, mask_lr=mask_lr, save_steps=save_steps)
    check_positive(kept_steps=kept_steps, kept_lr=kept_lr)
    if kept_steps is not None and not embeds:
        raise ValueError(f"--kept-steps must not be given without --task {embeddings.TASK} (got {kept_steps})")
    if kept_lr is not None and kept_steps is None:
        raise ValueError(f"--kept-lr must not be given without --kept-steps (got {kept_lr})")
    if bf16:
        check_bf16()
    config = PruneConfig(
        rank=rank, alpha=alpha, dropout=dropout, preset=preset, sparsity=sparsity, cost=cost, align=align, seed=seed
    )
    options = TrainOptions(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size or (embeddings.BATCH_SIZE if embeds else 8),
        learning_rate=lr if lr is not None else 5e-5 if preset == "paper" else 1e-3 if embeds else 5e-4,
        final_learning_rate=final_lr,
        mask_learning_rate=mask_lr,
        rule=rule,
        stage_one=stage_one,
        max_length=max_length,
        save_steps=save_steps,
        seed=seed,
        bf16=bf16,
    )
    source = str(demo_model(model)) if model in MODEL_NAMES else model
    if embeds:
        embeddings.refuse_others(
            text=text, choices=choices, label=label, label_columns=label_columns, label_separator=label_separator,
            task_type=task_type, regression=regression, metric=metric, validation=validation, test=test,
        )  # fmt: skip
        embeddings.train_embeddings(
            model, source, data, config, options, out, resume, quantize, kept_steps, kept_lr, batch_size
        )
        return
    data_task = task_of(
        task, data,
        text=text, choices=choices, label=label, label_columns=label_columns, label_separator=label_separator,
        task_type=task_type, regression=regression, metric=metric, validation=validation, test=test,
    )  # fmt: skip
    with reading(source):
        try:
            dense, tokenizer = load_dense(source, data_task, seed)
        except RuntimeError:  # of transformers, for shapes; it says them to a log only
            check_head(data_task.model_class(), source, data_task.name, **data_task.model_kwargs())
            raise
    check_length(dense, source, max_length)
    say_cut(data_task, tokenizer, max_length, ("train", data_task.score_split))
    pruner, trained = fine_tune(dense, tokenizer, data_task, config, options, out, resume, console)
    masked, _ = evaluate(pruner.model, tokenizer, data_task, max_length, console=console)
    small = finish(pruner, tokenizer, out, rule)
    compact, _ = evaluate(small, tokenizer, data_task, max_length, console=console)
    plan, score, calibrated = pruner.plan(), {"masked": masked, "compact": compact}, {}
    if quantize is not None:
        found = quantizing.quantize(small, tokenizer, data_task, quantize, out, max_length, options.batch_size, seed)
        score[quantize], _ = evaluate(small, tokenizer, data_task, max_length, console=console)
        calibrated = {"calibrated": {"weights": quantize, "least_db": found.least_db, "held": found.held}}
        console.print(str(found), highlight=False, soft_wrap=True)
    write_report(
        out,
        task=data_task.name,
        model=model,
        config=config,
        options=options,
        trained=trained,
        score=score,
        block_params={"compact": plan.params(), "dense": plan.dense_params()},
        **calibrated,
    )
    plot(trained["history"], trained, out / "report.png")
    title = f"{data_task.name}: {100 * trained['sparsity']:.2f} % of the block {cost} removed"
    console.print(kinds_table(title, trained["by_kind"]))
    name, split = data_task.metric, data_task.score_split
    before, after = (data_task.show(score[name]) for score in (masked, compact))
    rounded = "" if quantize is None else f", {data_task.show(score[quantize][name])} in {quantize}"
    console.print(f"{split} {name}: {before} before removal, {after} after{rounded}")
    console.print(f"{out / 'compact'}  {out / 'adapter'}  {out / 'report.json'}  {out / 'report.png'}")
