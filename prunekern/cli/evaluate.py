"""prunekern eval"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .errors import reading
from .fits import check_head, check_kind, check_length, say_cut
from .options import (
    Activations,
    Choices,
    Data,
    Label,
    LabelColumns,
    LabelSeparator,
    MaxLength,
    Metric,
    Regression,
    Split,
    TaskName,
    TaskType,
    Text,
    Threads,
    Weights,
    app,
    console,
    set_threads,
    task_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a compact (or dense) model with its tokenizer.")],
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
    max_length: MaxLength = 128,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of --task: lm-eval's multiple-choice tasks, for decoders, with commas between: "
            "boolq,piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa. Needs the extra eval."
        ),
    ] = None,
    local: Annotated[
        Path | None, typer.Option(help="Folder with TASK/SPLIT.jsonl for --tasks, instead of the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each of --tasks; all without it.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Choices at once for --tasks; 8 without it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write what --tasks gave to.")] = None,
    weights: Weights = None,
    activations: Activations = "auto",
    threads: Threads = 0,
) -> None:
    """Score a saved model on a task, or on several of lm-eval's."""
    from ..compacting.checkpoint import check_kinds
    from ..storage.tokenizer import load_tokenizer
    from ..tasks import Task
    from ..training.recipe import evaluate

    set_threads(threads)
    check_kinds(weights, activations, "eval")
    if not model.is_dir():
        raise FileNotFoundError(f"{model}: no such folder")
    columns: dict[str, Any] = {"text": text, "choices": choices, "label": label, "label_columns": label_columns}
    columns |= {"label_separator": label_separator, "task_type": task_type, "regression": regression}
    columns |= {"metric": metric, "validation": validation, "test": test}
    if tasks is not None:
        if any(o is not None for o in (task, data, *columns.values())):
            raise typer.BadParameter("give --tasks without --task, --data and the options of --data")
        held = weights, activations
        return _lm_eval(model, tasks, local, limit, 8 if batch_size is None else batch_size, json_file, held)
    if any(o is not None for o in (local, limit, batch_size, json_file)):
        raise typer.BadParameter("--local, --limit, --batch-size and --json go with --tasks")
    data_task = task_of(task, data, **columns)
    loaded = _loaded(data_task.model_class(), model, (weights, activations), f"a task like {data_task.name}")
    if isinstance(data_task, Task) and loaded.config.num_labels != data_task.num_labels:
        raise ValueError(f"{model}: has {loaded.config.num_labels} labels, {data_task.name} has {data_task.num_labels}")
    if isinstance(data_task, Task):
        check_kind(loaded, model, data_task)
    if isinstance(data_task, Task) and data_task.label_names is not None:
        known = [loaded.config.id2label[i] for i in range(loaded.config.num_labels)]
        _compare_labels(model, known, data_task.name, data_task.label_names)
    check_length(loaded, model, max_length)
    with reading(model):
        tokenizer = load_tokenizer(model)
    say_cut(data_task, tokenizer, max_length, (data_task.score_split,))
    metrics, scored = evaluate(loaded, tokenizer, data_task, max_length, console=console)
    for name, value in metrics.items():
        rows = f"{data_task.score_split} ({len(scored):,})"
        console.print(f"{data_task.name}, {rows}: {name} {data_task.show(value)}")


def _compare_labels(model: Path, known: list[str], name: str, ours: Sequence[str]) -> None:
    """Labels are scored by number. ValueError where the model has the data's names in another order; a warning where it
    has other names; nothing where it has none.
    """
    folded, wanted = ([str(label).casefold() for label in names] for names in (known, ours))
    if folded == wanted or folded == [f"label_{i}" for i in range(len(folded))]:
        return
    if sorted(folded) == sorted(wanted):
        raise ValueError(f"{model}: has the labels {known}, {name} has them as {list(ours)}")
    console.print(
        f"[yellow]warning:[/] labels are compared by number: the model's are {known}, the data's {list(ours)}"
    )


def _loaded(cls: Any, model: Path, held: tuple[str | None, str], purpose: str) -> PreTrainedModel:
    """The model of a folder, compact or dense, with weights and activations as `held` says; ValueError where its head
    would be a random one.
    """
    import torch

    from ..compacting import hf  # noqa: F401  (compact folders load too)
    from ..compacting.checkpoint import set_weights
    from ..training.recipe import with_head

    options = {"output_loading_info": True, "dtype": torch.float32}
    with reading(model):
        try:
            loaded, found = with_head(cls, str(model), purpose, **options)
        except RuntimeError:  # of transformers, for shapes; it says them to a log only
            check_head(cls, str(model), purpose, dtype=torch.float32)
            raise
    if found["missing_keys"]:  # transformers draws them at random: a score of that would be a coin toss
        raise ValueError(f"{model}: has no tensor {min(found['missing_keys'])!r}; it was not trained for {purpose}")
    return set_weights(loaded, *held)


def _lm_eval(
    model: Path,
    tasks: str,
    local: Path | None,
    limit: int | None,
    batch_size: int,
    json_file: Path | None,
    held: tuple[str | None, str],
) -> None:
    from transformers import AutoModelForCausalLM

    from ..compacting.checkpoint import weights_of
    from ..storage.tokenizer import load_tokenizer
    from ..tasks.harness import evaluate_tasks

    if json_file is not None and not json_file.absolute().parent.is_dir():  # not after hours of scoring
        raise typer.BadParameter(f"--json: there is no folder {json_file.parent}")
    loaded = _loaded(AutoModelForCausalLM, model, held, "predicting text")
    with reading(model):
        tokenizer = load_tokenizer(model)
    names = [name.strip() for name in tasks.split(",")]
    try:
        scores = evaluate_tasks(loaded, tokenizer, names, local, limit, batch_size, console=console)
    except ImportError as error:  # lm-eval is an extra
        raise ValueError(error) from None
    if json_file is not None:
        made_of = {"model": str(model), "weights": weights_of(loaded), "activations": held[1]}
        json_file.write_text(json.dumps(made_of | scores) + "\n")
    table = Table()
    for column in ("task", "items", "acc", "acc_norm"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, score in scores["tasks"].items():
        table.add_row(name, f"{score['items']:,}", *(_cell(score, metric) for metric in ("acc", "acc_norm")))
    console.print(table)
    items = "all items" if limit is None else f"first {limit} items"
    console.print(
        f"mean of those marked *: {100 * scores['mean']:.2f} (lm-eval {scores['lm_eval']}, zero-shot, {items})"
    )
    if scores["truncated"]:
        console.print(f"[yellow]warning:[/] {scores['truncated']:,} prompts were cut to what the model can read")
    if json_file is not None:
        console.print(str(json_file))


def _cell(score: dict[str, Any], metric: str) -> str:
    """A score in points with its standard error; marked where papers quote it."""
    if score[metric] is None:
        return ""
    error = score[f"{metric}_stderr"]
    text = f"{100 * score[metric]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
    return f"[bold]{text} *[/]" if metric == score["quoted"] else text
