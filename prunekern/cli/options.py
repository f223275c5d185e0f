"""The command line's app and console, and the options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ..tasks import AnyTask

app = typer.Typer(
    help="The command `prunekern`: train, compact, store, export, eval, bench, demo, info.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.callback()
def everywhere(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error was, not one line of it.")
    ] = False,
) -> None:
    """Train, compact, store, export, score and time: what belongs to all commands."""


# Option types that several commands share.
Out = Annotated[Path, typer.Option(help="Folder to write to.")]
TaskName = Annotated[
    str | None,
    typer.Option(
        help="reviews, topics, tweets; wikipedia, winogrande, science (decoders); embeddings (texts without labels, "
        "a line each, of a SentenceTransformer); or a GLUE task: "
        "mrpc rte sst2 mnli cola qnli qqp stsb."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Local .csv, .tsv, .jsonl, .json or .parquet, .conll of words with tags, or .txt of running text, instead "
        "of --task."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text column of --data: text, or of tokens tokens, without it; two with a comma between for pairs."
    ),
]
Choices = Annotated[
    str | None, typer.Option(help="Column of --data with each row's choices: multiple choice, for decoders.")
]
Label = Annotated[str | None, typer.Option(help="Label column of --data: label, or of tokens tags, without it.")]
TaskType = Annotated[
    str | None,
    typer.Option(
        help="What the labels of --data are: classification, regression, multi-label, or tokens (a tag for every "
        "word). Without it they decide: numbers that are not all whole are a regression, lists are multi-label, or "
        "tags where the text is a list, too."
    ),
]
LabelColumns = Annotated[
    str | None,
    typer.Option(help="Columns of 0 or 1 instead of --label, one a class, with commas between: multi-label."),
]
LabelSeparator = Annotated[
    str | None, typer.Option(help="What stands between the classes in --label, as | in a|b: multi-label.")
]
Regression = Annotated[
    bool | None,
    typer.Option(
        "--regression/--classes",
        help="Short for --task-type regression, and --task-type classification.",
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="Of --data, the first where none is given: accuracy, matthews; of a regression pearson, spearman, mse; of "
        "multi-label micro_f1, macro_f1, exact_match; of tokens entity_f1, accuracy."
    ),
]
Split = Annotated[Path | None, typer.Option(help="A file of its own for this split of --data.")]
MaxLength = Annotated[int, typer.Option(help="Tokens a text is cut to.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="How a compact model holds its block weights: fp32, bf16, int8 or int4; without it, as they are stored."
    ),
]
Bf16 = Annotated[
    bool, typer.Option("--bf16", help="Train under autocast to bf16: products in 16 bits, sums and gains in fp32.")
]
Activations = Annotated[
    str,
    typer.Option(
        help="What becomes of what int8 and int4 weights are multiplied with: auto (the faster here), float or int8."
    ),
]
Threads = Annotated[int, typer.Option(help="Threads of torch and the C++ kernels; 0 leaves torch's default.")]


def task_of(task: str | None, data: Path | None, **columns: Any) -> AnyTask:
    """The task that --task or --data names. columns: the options of --data, by name."""
    from .. import tasks

    if (task is None) == (data is None):
        raise typer.BadParameter("give either --task or --data")
    if data is None:
        assert task is not None
        if any(o is not None for o in columns.values()):
            named = {"regression": "regression/--classes"}
            listed = [f"--{named.get(name, name).replace('_', '-')}" for name in columns]
            raise typer.BadParameter(f"{', '.join(listed[:-1])} and {listed[-1]} go with --data")
        return tasks.get(task)
    several = columns["label_columns"]
    if several is not None:
        columns["label_columns"] = tuple(t.strip() for t in several.split(","))
    text = columns["text"]
    if text is not None and "," in text:
        columns["text"] = tuple(t.strip() for t in text.split(","))
    return tasks.get(data, **columns)


def set_threads(count: int) -> None:
    import torch

    most = max(256, os.cpu_count() or 1)  # a million of them ends the process, and no library says so
    if not 0 <= count <= most:
        raise typer.BadParameter(f"--threads must be in 0..{most} (got {count})")
    if count:
        torch.set_num_threads(count)
