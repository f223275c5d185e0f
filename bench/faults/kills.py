"""SIGKILL at random moments of saving and of training: nothing is lost, and what goes on afterwards is right."""

from __future__ import annotations

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

import prunekern as pk
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import batch, logits
from tests.helpers.trainer_runs import fresh, result

from ..common import progress
from .tally import Tally, in_fork


def saving(seed: int, count: int, scratch: Path) -> Tally:
    """Saves over an existing folder, killed: the old or the new model loads, and the next save leaves nothing beside.

    In a forked child each: importing torch anew would take longer than all else.
    """
    rng, tally, path = random.Random(seed), Tally("kills while saving"), scratch / "saved" / "model"
    models = [small_model(share=share) for share in (0.5, 0.2)]
    answers = [logits(model, batch()) for model in models]
    pk.save(models[0], path)
    start = time.perf_counter()
    pk.save(models[0], path)
    takes, killed, left = time.perf_counter() - start, 0, 0
    with progress.bar(tally.kind) as tell:
        while killed < count:
            tell(killed / count)
            old = killed % 2
            pk.save(models[old], path)
            status = in_fork(partial(pk.save, models[1 - old], path), rng.random() * 2 * takes)
            if status == 0:
                continue  # it was done before
            killed += 1
            hidden = _hidden(path.parent)
            left += len(hidden)
            what = f"{killed}: status {status}, beside it {hidden}"
            try:
                y = logits(pk.load(path), batch())
            except Exception as error:
                tally.add("lost", f"{what}: {type(error).__name__}: {error}")
                continue
            pk.save(models[old], path)
            if status != -signal.SIGKILL or not any(torch.equal(y, answer) for answer in answers):
                tally.add("wrong", what)
            elif _hidden(path.parent):
                tally.add("wrong", f"{what}: after the next save {_hidden(path.parent)}")
            else:
                tally.add("right")
    progress.say(f"{tally.kind}: {left} hidden folders were left by them, and cleared by the next save")
    return tally


def _hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def training(seed: int, count: int, scratch: Path) -> Tally:
    """Runs killed some times each and resumed, to the end: weights, masks and plan of the run that went through."""
    rng, tally, number = random.Random(seed), Tally("kills in training"), 0
    start = time.perf_counter()
    want = _trained(scratch / "whole")
    takes = time.perf_counter() - start
    killed = 0
    with progress.bar(tally.kind) as tell:
        while killed < count:
            number += 1
            folder, most = scratch / f"run{number}", min(killed + rng.randint(1, 4), count)
            before, statuses = killed, []
            while True:
                tell(killed / count)
                # The first moments are those of getting ready, in which there is little to lose.
                after = takes * (0.1 + rng.random()) if killed < most else None
                statuses.append(in_fork(partial(_write, folder), after))
                if statuses[-1] != -signal.SIGKILL:
                    break
                killed += 1
            tally_of = killed - before
            if tally_of == 0:
                continue
            what = f"run {number}, killed {tally_of} times: statuses {statuses}"
            if statuses[-1] != 0:
                outcome = "lost"
            else:
                got = torch.load(folder / "result.pt", weights_only=True)
                outcome = "right" if _same(got, want) else "wrong"
            for _ in range(tally_of):
                tally.add(outcome, what)
    return tally


def _trained(folder: Path) -> dict[str, Tensor]:
    trainer = _quiet(folder)
    try:
        trainer.train(resume_from_checkpoint=True)
    except FileNotFoundError:  # killed before its first checkpoint, or new
        trainer = _quiet(folder)
        trainer.train()
    found: dict[str, Tensor] = result(trainer)
    return found


def _quiet(folder: Path) -> Any:
    trainer = fresh(folder, save_steps=1)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _write(folder: Path) -> None:
    torch.save(_trained(folder), folder / "result.pt")


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], t) for name, t in want.items())
