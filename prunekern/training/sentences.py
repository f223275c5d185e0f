"""From a SentenceTransformer and texts without labels to a compact one: `prunekern train --task embeddings`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers import SentenceTransformerTrainer as Trainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import nn
from transformers import PrinterCallback, TrainerState, set_seed

from ..families.sentence import transformer_in
from ..pruning.attach import attach
from ..pruning.config import PruneConfig
from ..pruning.pruner import Pruner
from .callback import PruneCallback
from .checkpoints import finished_state, last_full_checkpoint, to_go_on_from
from .embeddings import DistilLoss
from .optimizer import optimizer
from .progress import RichProgress
from .recipe import TrainOptions, same_run

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "text"  # the column
_TOGETHER = 50  # batches whose texts are sorted by length: as many as still make batches of all kinds


class ByLength(DefaultBatchSampler):
    """Batches of texts of like length, in an order that is a function of seed and epoch alone.

    Padding to the longest of texts as they come is half of all tokens where lengths differ as they do in the world.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool = False, seed: int = 0, **kwargs: Any):
        super().__init__(range(len(dataset)), batch_size, drop_last, **kwargs, seed=seed)
        self.lengths = np.array([len(text) for text in dataset[TEXT]])
        self.size, self.drops, self.by = batch_size, drop_last, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """What `__iter__` starts from next; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng((self.by, self.epoch))
        order = draw.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(order), _TOGETHER * self.size):
            some = order[start : start + _TOGETHER * self.size]
            some = some[np.argsort(self.lengths[some], kind="stable")]
            batches += [some[i : i + self.size] for i in range(0, len(some), self.size)]
        if self.drops:
            batches = [batch for batch in batches if len(batch) == self.size]
        for at in draw.permutation(len(batches)):
            yield batches[at].tolist()

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.size)
        return whole + (rest > 0 and not self.drops)


def read_texts(file: Path) -> list[str]:
    """The lines of a text file, blank ones left out. ValueError for a file without any, or that is not UTF-8."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a text a line")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be UTF-8 ({error.reason} at byte {error.start})") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{file}: holds no text: {len(lines)} lines, all of them empty")
    return texts


def distil_sentences(
    model: SentenceTransformer,
    texts: Sequence[str],
    config: PruneConfig,
    options: TrainOptions,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[Pruner, dict[str, Any]]:
    """Attach, distil in both stages, finalise. Returns the pruner and its report (what was kept; seconds of training).

    Norms are trained, too, without dropout. ValueError for a run that is resumed with other options, config or texts,
    and where there are fewer texts than a batch has: their cosines are what is learnt from.
    """
    if len(texts) < options.batch_size:
        raise ValueError(f"texts must be at least {options.batch_size}, one batch (got {len(texts)})")
    set_seed(options.seed)
    pruner = attach(model, config)
    if options.max_length and model.max_seq_length is not None:
        model.max_seq_length = min(options.max_length, model.max_seq_length)
    for module in pruner.model.modules():  # a few numbers a layer, which removed channels leave off their mean
        if type(module).__name__.endswith("Norm"):
            module.requires_grad_(True)
    loss = DistilLoss(model, pruner)
    folder = out / "checkpoints"
    args = sentence_arguments(options, folder)
    pruning = PruneCallback(
        pruner,
        stage_one=options.stage_one,
        warm=options.warm,
        ramp=options.ramp,
        final_learning_rate=options.final_learning_rate,
        mask_learning_rate=options.mask_learning_rate,
        rule=options.rule,
        distil=loss,
    )
    optimizers: Any = (
        optimizer(pruner, args, options.mask_learning_rate, model),
        None,
    )  # the schedule is the Trainer's
    rows = Dataset.from_dict({TEXT: list(texts)})
    trainer = Trainer(model, args, train_dataset=rows, loss=loss, callbacks=[pruning], optimizers=optimizers)
    what = {"task": "embeddings", **config.to_dict()}
    state, seconds = run(trainer, what, options, rows, resume, RichProgress(pruner, console))
    pruner.steps = state.global_step
    return pruner, {
        **(pruning.report or pruner.report()),
        "train_seconds": seconds,
        "steps": state.global_step,
        "history": [entry for entry in state.log_history if "loss" in entry],
    }


def sentence_arguments(options: TrainOptions, folder: Path) -> Arguments:
    """Of a run on texts, whose checkpoints go to `folder`."""
    return Arguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=10,
        batch_sampler=ByLength,
        dataloader_drop_last=True,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=options.bf16 and not torch.accelerator.is_available(),
    )


@contextmanager
def exact_and_fast(model: nn.Module) -> Iterator[None]:
    """No module of it drops anything meanwhile: a teacher is no noisy label to be protected from, and noise is more
    than a pruned model can follow. On the CPU attention is transformers' "eager": PyTorch's fused one takes four times
    as long backwards (bf16, 32 texts of 106 tokens: 0.16 s a layer of a step of 1.9).
    """
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    rates = [m.p for m in dropouts]
    inner: Any = transformer_in(model, "run")
    attention = inner.config._attn_implementation
    slow = attention == "sdpa" and next(inner.parameters()).device.type == "cpu"
    try:
        for module in dropouts:
            module.p = 0.0
        if slow:
            inner.set_attn_implementation("eager")
        yield
    finally:
        for module, rate in zip(dropouts, rates, strict=True):
            module.p = rate
        if slow:
            inner.set_attn_implementation(attention)


def run(
    trainer: Trainer, what: dict[str, Any], options: TrainOptions, rows: Dataset, resume: bool, progress: RichProgress
) -> tuple[TrainerState, float]:
    """Train as `exact_and_fast` has it, from the newest checkpoint on with `resume`. Returns the state at the end, and
    the seconds it took.

    what: names and values that, with options and rows, a run is made of; ValueError where it is resumed with others.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)
    folder = Path(str(trainer.args.output_dir))
    newest = to_go_on_from(last_full_checkpoint(folder), resume)
    same_run(folder / "run.json", what, options, rows, newest is not None)
    finished = None if newest is None else finished_state(newest, trainer.args)
    start = time.perf_counter()
    try:
        if finished is None:
            with exact_and_fast(trainer.model):
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        else:  # transformers would take one more step
            trainer._load_from_checkpoint(str(newest))
            trainer.state = finished
    finally:
        progress.close()
    return trainer.state, time.perf_counter() - start


def held_out(texts: Sequence[str], most: int = 500) -> tuple[list[str], list[str]]:
    """(for training, for the score): every twentieth text is held out, of those in an order of their own, `most` at
    most; the draw depends on the number of texts only. Texts that are there twice count once.
    """
    once = list(dict.fromkeys(texts))
    order = np.random.default_rng(len(once)).permutation(len(once))
    count = min(most, len(once) // 20)
    score = set(order[:count].tolist())
    return [t for i, t in enumerate(once) if i not in score], [once[i] for i in sorted(score)]


def embed(
    model: SentenceTransformer, texts: Sequence[str], batch_size: int = 32, prompt: str | None = None
) -> np.ndarray:
    """float64 unit rows [texts, width]. prompt: before each; None: the model's own."""
    found = model.encode(
        list(texts), prompt=prompt, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
    )
    rows: np.ndarray = np.asarray(found, dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """How near embeddings are to those of another model of the same texts, both [texts, width], unit rows.

    cosine: the mean between both of one text. spearman: rank correlation of the cosines of all pairs of texts; NaN
    of fewer than three texts.
    """
    from scipy.stats import spearmanr

    upper = np.triu_indices(len(ours), 1)
    pairs = [(x @ x.T)[upper] for x in (ours, theirs)]
    rank = float(spearmanr(*pairs).statistic) if len(ours) > 2 else float("nan")
    return {"cosine": float((ours * theirs).sum(1).mean()), "spearman": rank}
