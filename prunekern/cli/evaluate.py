"""prunekern eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Choices,
    Data,
    Label,
    MaxLength,
    Split,
    TaskName,
    Text,
    Threads,
    Weights,
    app,
    console,
    set_threads,
    task_of,
)


@app.command("eval")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="Folder of a compact (or dense) model with its tokenizer.")],
    task: TaskName = None,
    data: Data = None,
    text: Text = None,
    choices: Choices = None,
    label: Label = None,
    validation: Split = None,
    test: Split = None,
    max_length: MaxLength = 128,
    weights: Weights = "fp32",
    threads: Threads = 0,
) -> None:
    """Score a saved model on a task."""
    from transformers import AutoTokenizer

    from .. import hf  # noqa: F401  (compact folders load too)
    from ..checkpoint import set_weights
    from ..recipe import evaluate
    from ..tasks import Task

    set_threads(threads)
    data_task = task_of(task, data, text=text, choices=choices, label=label, validation=validation, test=test)
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
