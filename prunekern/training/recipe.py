"""From a dense model and a task to a trained, compact one: what `prunekern train` and the demo do."""

from __future__ import annotations

import functools
import hashlib
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compacting.checkpoint import save
from ..compacting.compact import compact
from ..exporting.stock import save_stock
from ..families.wrapped import take_off_mixed_precision
from ..pruning.adapter import save_adapter
from ..pruning.attach import attach
from ..pruning.config import PruneConfig
from ..pruning.pruner import Pruner
from ..storage.progress import track
from ..storage.tokenizer import load_tokenizer
from ..tasks import AnyTask, ChoiceTask, Task
from ..tasks.entities import IGNORED

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class TrainOptions:
    """How to train; `PruneTrainer` says what the learning rates and the shares of the steps are."""

    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 8
    learning_rate: float = 5e-4
    final_learning_rate: float | None = None
    mask_learning_rate: float | None = None
    rule: str = "learned"
    stage_one: float | None = None
    warm: float | None = None
    ramp: float | None = None
    warmup_steps: int = 0
    max_length: int = 128
    save_steps: int = 500
    seed: int = 0
    bf16: bool = False  # autocast in training; scores are those of fp32


def load_dense(model: str, task: AnyTask, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model with a head for `task`, and its tokenizer. `model`: a folder or a name on the hub.

    seed: of the head's first weights, where the checkpoint has none. In the checkpoint's dtype where there is a GPU,
    else in fp32.
    """
    from transformers import set_seed

    refuse_missing(model)
    set_seed(seed)
    tokenizer = load_tokenizer(model)
    # Products in 16 bits kill the process on some CPUs, and are slow on most.
    dtype = {} if torch.cuda.is_available() else {"dtype": torch.float32}
    dense = with_head(task.model_class(), model, task.name, **task.model_kwargs(), **dtype)
    if tokenizer.pad_token is None:  # decoders often come without one; what stands there is masked
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(dense.config, "pad_token_id", None) is None:  # a classifier of theirs reads the last token that is none
        dense.config.pad_token_id = tokenizer.pad_token_id
    return dense, tokenizer


def refuse_missing(model: str) -> None:
    """FileNotFoundError for what can only be a path and is not there: the hub would be asked for it."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise FileNotFoundError(f"{model}: no such folder")


def with_head(auto_class: Any, model: str, purpose: str, **options: Any) -> Any:
    """`auto_class.from_pretrained(model, **options)`; a one-line ValueError where the architecture has no such head."""
    try:
        return auto_class.from_pretrained(model, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(model).model_type
        raise ValueError(f"{model}: is a {kind} model, which has no head for {purpose}") from None


def training_arguments(options: TrainOptions, out: Path, **extra: Any) -> TrainingArguments:
    """TrainingArguments of a run, ours or a baseline's."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=options.bf16 and not torch.accelerator.is_available(),  # without it bf16 asks for a GPU
        **extra,
    )


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: AnyTask,
    config: PruneConfig,
    options: TrainOptions,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[Pruner, dict[str, Any]]:
    """Attach, train both stages, finalise. Returns the pruner and its report (what was kept; seconds of training)."""
    from transformers import PrinterCallback, set_seed

    from .checkpoints import last_checkpoint, to_go_on_from
    from .progress import RichProgress
    from .trainer import PruneTrainer

    set_seed(options.seed)
    encoded = task.encode(tokenizer, options.max_length)
    pruner = attach(model, config)
    progress = RichProgress(pruner, console)
    trainer = PruneTrainer(
        args=training_arguments(options, out / "checkpoints"),
        pruner=pruner,
        stage_one=options.stage_one,
        warm=options.warm,
        ramp=options.ramp,
        final_learning_rate=options.final_learning_rate,
        mask_learning_rate=options.mask_learning_rate,
        rule=options.rule,
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
        objective=task.objective if isinstance(task, ChoiceTask) else None,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    # A run killed before its first checkpoint starts again, and ends the same.
    resume = to_go_on_from(last_checkpoint(out / "checkpoints"), resume) is not None
    same_run(out / "checkpoints" / "run.json", {"task": task.name}, options, encoded["train"], resume)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        progress.close()
    take_off_mixed_precision(pruner.model)
    return pruner, {
        **(trainer.report or pruner.report()),
        "train_seconds": time.perf_counter() - start,
        "steps": trainer.state.global_step,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


# What a run may be resumed with in place of what it began with.
_MAY_CHANGE = ("epochs", "max_steps", "save_steps")


def same_run(file: Path, what: dict[str, Any], options: TrainOptions, rows: Any, resume: bool) -> None:
    """Write down what a run is made of: `what`, by name, options and rows. When it is resumed, ValueError unless it is
    made of the same.
    """
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    made_of: dict[str, Any] = {k: v for k, v in asdict(options).items() if k not in _MAY_CHANGE}
    made_of |= {**what, "training rows": f"{len(rows)}, sha256 {digest.hexdigest()[:16]}"}
    if not resume:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made_of, indent=2) + "\n")
        return
    began = json.loads(file.read_text()) if file.is_file() else {}
    for name, value in made_of.items():
        if began.get(name, value) != value:
            raise ValueError(
                f"{file.parent}: the run began with {name} {began[name]!r}, to be resumed with {value!r}; resume it as "
                "it began, or train into another folder"
            )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: AnyTask,
    max_length: int = 128,
    split: str | None = None,
    console: Console | None = None,
) -> tuple[dict[str, float], Tensor]:
    """(metrics, predictions [rows, labels]) of a model on the task's scored split, batches bucketed by length.

    Of a TokenTask predictions are [rows, tokens, labels]; of a LanguageTask: (perplexity, losses [blocks, tokens]); of
    a ChoiceTask: (accuracy, log-likelihoods).
    """
    from transformers import EvalPrediction

    model.eval()
    if not isinstance(task, Task):
        bar = functools.partial(track, description="evaluating", console=console)
        return task.score(model, tokenizer, max_length, split, bar)
    data = task.encode(tokenizer, max_length)[split or task.score_split]
    collate, device = task.collator(tokenizer), next(model.parameters()).device
    order = torch.tensor(data["length"], device="cpu").argsort(stable=True).tolist()
    rows = [data[i] for i in order]
    found, wanted = [], []
    batches = [rows[i : i + 64] for i in range(0, len(rows), 64)]
    for batch in track(batches, description="evaluating", console=console):
        inputs = collate(batch)
        wanted.append(inputs.pop("labels"))
        found.append(model(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu())
    place = torch.tensor(order, device="cpu").argsort()
    logits, labels = (_joined(parts)[place] for parts in (found, wanted))
    return task.compute_metrics(EvalPrediction(predictions=logits.numpy(), label_ids=labels.numpy())), logits


def _joined(parts: list[Tensor]) -> Tensor:
    """[rows, ...] of all batches. Labels of tokens are as many as the longest row of their batch has: what is beyond is
    IGNORED, and so the logits there.
    """
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    whole = parts[0].new_full((sum(map(len, parts)), *shape), IGNORED)  # [rows, ...]
    first = 0
    for part in parts:
        whole[(slice(first, first + len(part)), *map(slice, part.shape[1:]))] = part
        first += len(part)
    return whole


def finish(pruner: Pruner, tokenizer: PreTrainedTokenizerBase, out: Path, rule: str = "learned") -> PreTrainedModel:
    """Write OUT/adapter, OUT/compact and, of rule "stock", OUT/stock (both with the tokenizer); return the compact
    model.
    """
    save_adapter(pruner, out / "adapter")
    small = compact(pruner.model)
    save(small, out / "compact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer.save_pretrained(out / "compact")
        if rule == "stock":
            save_stock(small, out / "stock")
            tokenizer.save_pretrained(out / "stock")
    return small


def write_report(out: Path, **content: Any) -> Path:
    """OUT/report.json; dataclasses are written as their fields."""
    path = out / "report.json"
    path.write_text(json.dumps(content, indent=2, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
