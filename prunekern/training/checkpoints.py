"""Checkpoints of a run: which one to go on from, what lies beside the adapter, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from ..storage.headers import read_header


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a `PruneTrainer`: a kill while one was written leaves it out."""

    def read(path: Path) -> None:
        json.loads((path / "adapter_config.json").read_text())
        read_header(path / "adapter.safetensors")

    return _newest(output_dir, read)


def last_full_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of a Trainer that writes whole models."""

    def read(path: Path) -> None:
        read_header(next(path.rglob("*.safetensors"), path / "model.safetensors"))

    return _newest(output_dir, read)


def _newest(output_dir: str | os.PathLike[str], read: Callable[[Path], None]) -> Path | None:
    """read: raises ValueError or OSError for a checkpoint whose files are not whole."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        state = path / TRAINER_STATE_NAME  # Trainer writes it last
        if number and state.is_file():
            try:
                json.loads(state.read_text())
                read(path)
            except (ValueError, OSError):
                continue
            found.append((int(number[1]), path))
    return max(found)[1] if found else None


def to_go_on_from(newest: Path | None, resume: bool) -> Path | None:
    """The checkpoint that a run starts from: with `resume` the newest, if there is one. ValueError for a run that
    starts anew beside checkpoints of an earlier one: Trainer would keep those of the higher step, and a later resume
    would go on from them.
    """
    if newest is not None and not resume:
        raise ValueError(
            f"{newest.parent}: holds {newest.name} of an earlier run; go on from it (--resume, resume=True), or train "
            "into another folder"
        )
    return newest


def save_beside(folder: str | os.PathLike[str], processing: Any, args: TrainingArguments) -> None:
    """What Trainer writes beside a model: the tokenizer (or processor), where there is one, and the arguments.

    The arguments are a pickle, as Trainer's; nothing of prunekern's or of Trainer's ever reads it.
    """
    if processing is not None:
        processing.save_pretrained(folder)
    torch.save(args, Path(folder) / TRAINING_ARGS_NAME)


def refuse_unfit(checkpoint: str | os.PathLike[str]) -> None:
    """ValueError for a checkpoint that Trainer would go on from with a new optimiser, without a word."""
    folder = Path(checkpoint)
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not (folder / name).is_file()]
    if missing and (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {missing[0]} (written with save_only_model?); a run resumed from "
            "it would not end as one that was never stopped. Use it with prunekern.load_adapter"
        )


def finished_state(checkpoint: str | os.PathLike[str], args: TrainingArguments) -> TrainerState | None:
    """The state of a checkpoint that has taken all the steps there are: Trainer would take one more."""
    file = Path(checkpoint) / TRAINER_STATE_NAME
    state = TrainerState.load_from_json(str(file)) if file.is_file() else None
    if state is None or (args.max_steps <= 0 and state.num_train_epochs != args.num_train_epochs):
        return None
    most = args.max_steps if args.max_steps > 0 else state.max_steps
    return state if state.global_step >= most else None


@contextmanager
def weights_only(checkpoint: str | os.PathLike[str] | None, names: str) -> Iterator[None]:
    """ValueError in place of what torch says of a file that holds more than tensors and plain values."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"resume_from_checkpoint: {names} in {checkpoint} must hold tensors and plain values only, and is not "
            f"read: {first}"
        ) from None
