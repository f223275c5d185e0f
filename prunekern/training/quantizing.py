"""A trained, compact model made ready for 8 bits and fewer: calibrated with the texts it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..compacting.calibrate import LEAST_DB, MOST_ROWS, Calibration, calibrate
from ..compacting.checkpoint import save, set_weights
from ..ops.packing import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..tasks import AnyTask

KINDS = tuple(kind for kind in LEAST_DB if kind in WEIGHTS and kind != "bf16")
_READ = ("input_ids", "attention_mask", "token_type_ids")  # what tasks' batches hold besides is not for the model


def check_kind(kind: str | None) -> None:
    """ValueError for weights that `quantize` does not know; None counts as not asked for."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--quantize must be one of {', '.join(KINDS)} (got {kind!r})")


def quantize(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: AnyTask,
    kind: str,
    out: Path,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> Calibration:
    """Calibrate the compact model with training rows of the task, drawn by seed, and write the choice to OUT/compact,
    which holds fp32 weights, of layers in int4 such as int4 holds exactly (see `calibrate`); then hold the model so. On
    the CPU, where it stays.
    """
    small.to("cpu")
    found = calibrate(small, _batches(task, tokenizer, max_length, batch_size, seed), weights=kind, hold=False)
    save(small, out / "compact")
    set_weights(small, kind)
    return found


def _batches(
    task: AnyTask, tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    rows, collate = task.encode(tokenizer, max_length)["train"], task.collator(tokenizer)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator, device="cpu").tolist()[:MOST_ROWS]  # a row has a token
    for first in range(0, len(order), batch_size):
        batch = collate([rows[i] for i in order[first : first + batch_size]])
        yield {name: batch[name] for name in _READ if name in batch}
