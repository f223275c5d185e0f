"""Multiple-choice tasks through EleutherAI's lm-eval: the choice that a decoder finds likeliest is its answer.

    scores = evaluate_tasks(model, tokenizer, QUOTED)                         # data from the hub
    scores = evaluate_tasks(model, tokenizer, ["boolq"], local="data")        # data/boolq/validation.jsonl

Prompts, splits and metrics are lm-eval's own definitions in both cases; only where the items come from differs.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import logging
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..storage.progress import Bar
from . import harness_local
from .task import DataError

# The seven tasks that papers on pruning LLaMA report, and which accuracy they mean by it: LLM-Pruner's choice (its
# issue 25), whose figures later papers copy. acc_norm divides a choice's log-likelihood by its characters.
QUOTED = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
_SEED = 1234  # lm-eval's own, of the few-shot examples
_DEFINES = re.compile(rb"""^["']?(task|group)["']?:[ \t]*["']?([^\s"'#]+)["']?[ \t\r]*(?:#.*)?$""", re.MULTILINE)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    local: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int = 0,
    console: Any = None,
) -> dict[str, Any]:
    """Accuracies of a causal language model, dense, masked or compact, on lm-eval's multiple-choice tasks.

    names: one or several of lm-eval's multiple-choice tasks, `QUOTED` among them. local: a folder with NAME/SPLIT.jsonl
        in the schema of the task's data set on the hub, for machines out of its reach; nothing is downloaded, sent,
        cached or written then. limit: items a task, the first ones. num_fewshot: solved examples before each item; a
        definition that fixes none keeps to that. The model runs where it is, and is left in eval mode.
    Returns plain data: {"tasks": {name: {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr" (None where the task has no
        such metric, or there is one item), "quoted": the metric of the two that papers quote, "items": how many,
        "chosen": index of the likeliest choice of each item, "right": its quoted accuracy, "num_fewshot",
        "version": lm-eval's, of the definition}}, in the order asked; "mean": of the quoted metrics, each task counting
        the same; "truncated": prompts that lost their beginning to the model's context length; "limit"; "lm_eval": its
        version}.
    Raises ValueError for an argument or model that is not accepted; DataError (a ValueError) for data that is not to be
        had or not of the task's schema; FileNotFoundError where `local` is no folder; ImportError without lm-eval.
    """
    names = [names] if isinstance(names, str) else list(names)
    _check_arguments(model, names, limit, batch_size, num_fewshot)
    if local is not None and not Path(local).is_dir():
        raise FileNotFoundError(f"evaluate_tasks: local: there is no folder {os.fspath(local)}")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"evaluate_tasks needs lm-eval ({error}): pip install 'prunekern[eval]'") from None
    with _quiet(), Bar(console=console) as progress:
        bar = progress.add_task("looking up tasks", total=None)
        # lm-eval takes 16 s to index its 14,000 definitions; finding those asked for takes 1 s, once a process.
        folders = sorted({str(definition(name).parent) for name in names})
        manager = TaskManager(include_defaults=False, include_path=folders)
        tasks = {}
        for name in names:
            progress.update(bar, description=f"reading {name}")
            tasks[name] = _load(manager, name, None if local is None else Path(local), limit, num_fewshot)
        progress.update(bar, description="evaluating")
        lm = _language_model(model, tokenizer, batch_size, progress, bar)
        # Not simple_evaluate, which also seeds the process anew and runs pip, git and nvidia-smi (4 s) for its report.
        found = lm_eval.evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0)
    scores = {name: _scores(name, found) for name in names}
    return {
        "tasks": scores,
        "mean": statistics.fmean(score[score["quoted"]] for score in scores.values()),
        "truncated": lm.truncated,
        "limit": limit,
        "lm_eval": lm_eval.__version__,
    }


def _check_arguments(model: Any, names: list[str], limit: Any, batch_size: Any, num_fewshot: Any) -> None:
    from transformers import PreTrainedModel

    if not names or len(set(names)) < len(names):
        raise ValueError(f"evaluate_tasks: names must be one or more different tasks (got {names})")
    numbers = {"limit": (1 if limit is None else limit, 1), "batch_size": (batch_size, 1)}
    for argument, (value, least) in (numbers | {"num_fewshot": (num_fewshot, 0)}).items():
        if type(value) is not int or value < least:
            raise ValueError(f"evaluate_tasks: {argument} must be an integer, at least {least} (got {value!r})")
    causal = isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder
    if not causal:
        raise ValueError(f"evaluate_tasks: model must be a causal language model (got {type(model).__name__})")


@functools.cache
def _definitions() -> dict[str, tuple[str, Path]]:
    """{name: ("task" or "group", file)} of all that lm-eval defines."""
    import lm_eval

    found: dict[str, tuple[str, Path]] = {}
    for file in Path(lm_eval.__file__).parent.joinpath("tasks").rglob("*.yaml"):
        found |= {name.decode(): (kind.decode(), file) for kind, name in _DEFINES.findall(file.read_bytes())}
    return found


def definition(name: str) -> Path:
    """The file of lm-eval that defines a task. ValueError for a name it does not know, or knows as a group."""
    known = _definitions()
    if name not in known:
        near = difflib.get_close_matches(name, known, 4) or QUOTED
        raise ValueError(f"evaluate_tasks: lm-eval has no task {name!r}; among its {len(known)} are {', '.join(near)}")
    kind, file = known[name]
    if kind == "group":
        raise ValueError(f"evaluate_tasks: {name!r} is a group of lm-eval's tasks; name those in it")
    return file


def _load(manager: Any, name: str, local: Path | None, limit: int | None, num_fewshot: int) -> Any:
    """lm-eval's task, with its data."""
    from datasets.exceptions import DatasetsError

    config = manager.task_index[name].cfg
    metrics = [metric["metric"] for metric in config.get("metric_list") or [{"metric": "acc"}]]
    if config.get("output_type") != "multiple_choice" or QUOTED.get(name, "acc") not in metrics:
        raise ValueError(f"evaluate_tasks: {name!r} is not a multiple-choice task with accuracy: it cannot be scored")
    source = {} if local is None else harness_local.source(local, name, config, num_fewshot)
    try:  # one task of a group is the way lm-eval lets keys of a definition be overridden
        task = manager.load({"group": "asked", "task": [{"task": name, **source}]})["tasks"][name]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        path = config.get("dataset_path")
        if local is not None:  # a template of the definition met the items: it may raise anything
            raise DataError(f"{local / name}: is not of the schema of {path} ({reason})") from error
        if not isinstance(error, (OSError, ValueError, DatasetsError)):
            raise
        raise DataError(
            f"task {name!r} could not be loaded from {path!r} on the hub ({reason}); out of its reach, pass "
            f"local=FOLDER, where FOLDER/{name} has the splits as .jsonl files in the hub's schema"
        ) from error
    if local is not None:
        harness_local.check(task, local / name, limit)
    if task.get_config("num_fewshot") != 0:
        task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(_SEED)
    return task


def _language_model(model: Any, tokenizer: Any, batch_size: int, progress: Any, bar: Any) -> Any:
    """The model as lm-eval calls it; requests done move the bar."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        truncated = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            progress.update(bar, total=len(requests))
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> Any:
            self.truncated += sum(len(start) + len(rest) > self.max_length + 1 for _, start, rest in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

    # lm-eval gives a tokenizer without padding token one: the caller's stays as it is.
    lm = Model(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *_: progress.advance(bar)))
    return lm


def _scores(name: str, found: dict[str, Any]) -> dict[str, Any]:
    samples, scores = found["samples"][name], {}
    for metric in ("acc", "acc_norm"):
        values = [float(sample[metric]) for sample in samples if metric in sample]
        scores[metric] = statistics.fmean(values) if values else None
        # The standard error of a mean, as lm-eval has it.
        scores[f"{metric}_stderr"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    quoted = QUOTED.get(name, "acc")
    likelihoods = [[likelihood for likelihood, _ in sample["filtered_resps"]] for sample in samples]
    return scores | {
        "quoted": quoted,
        "items": len(samples),
        "chosen": [row.index(max(row)) for row in likelihoods],
        "right": [float(sample[quoted]) for sample in samples],
        "num_fewshot": found["n-shot"][name],
        "version": found["versions"][name],
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars but ours, and of lm-eval's and the data sets' logs errors only."""
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "transformers")]
    levels, bars = [logger.level for logger in loggers], tqdm.__init__

    def none(self: Any, *args: Any, **options: Any) -> None:
        bars(self, *args, **options | {"disable": True})

    try:
        tqdm.__init__ = none
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        tqdm.__init__ = bars
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
