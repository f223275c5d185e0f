"""Full disks, forks and threads."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import prunekern as pk
from prunekern.ops import compact_linear, pack_weight
from prunekern.storage.shards import write_shard
from tests.helpers.compact_folders import small_model
from tests.helpers.on_disk import content
from tests.helpers.tiny_models import attached, batch, build, logits, prune

from ..common import progress
from .tally import Tally, in_fork

LIMIT = 60.0  # seconds: what takes longer hangs


def full_disks(seed: int, count: int, scratch: Path) -> Tally:
    """A limit on the size of files, of a random number of bytes: an error of the system, and the old folder whole."""
    rng, tally = random.Random(seed), Tally("full disks")
    small, masked = small_model(share=0.2), build()
    pruner = prune(attached(masked), 0.3)
    saves: dict[str, Callable[[Path], None]] = {
        "save": lambda path: pk.save(small, path),
        "save_adapter": lambda path: pk.save_adapter(pruner, path),
    }
    for name, save in saves.items():
        path = scratch / "full" / name
        save(path)
        before, most = content(path), max(p.stat().st_size for p in path.iterdir())
        for i in range(count):
            status = in_fork(partial(_limited, rng.randrange(most), save, path), limit=LIMIT)
            if status is None or status < 0:
                tally.add("crashed", f"{name} {i}: status {status}")
            elif content(path) != before:
                tally.add("lost", f"{name} {i}: the old folder is another")
            elif status == 2 and not [p for p in path.parent.iterdir() if p.name.startswith(".")]:
                tally.add("refused")
            else:
                tally.add("wrong", f"{name} {i}: status {status}, beside it {sorted(path.parent.iterdir())}")
    if Path("/dev/full").is_char_device():
        try:
            write_shard(Path("/dev/full"), {"a": torch.zeros(10_000)}, lambda name: [torch.zeros(10_000)])
            tally.add("wrong", "write_shard to /dev/full: no error")
        except OSError:
            tally.add("refused")
    return tally


def _limited(size: int, save: Callable[[Path], None], path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        save(path)
    except Exception as error:  # safetensors has an error of its own
        os._exit(2 if "File too large" in str(error) or "os error 27" in str(error) else 3)


def forks(count: int) -> Tally:
    """A call in a forked child of a process that has called: the same answer, and no hang."""
    tally = Tally("forks")
    small, masked = small_model(share=0.3), build(seed=1)
    prune(attached(masked), 0.3)
    x, weight = torch.randn(300, 372), torch.randn(577, 372) / 20
    packed = pack_weight(weight) if pk._native.available() else weight
    layer = pk.nn.CompactLinear(weight)
    calls: dict[str, tuple[int, Callable[[], Tensor]]] = {
        # torch's own loops hang in a forked child of a process that used two threads: ours must not.
        "compact_linear, two threads": (2, lambda: compact_linear(x, packed, None, None, None, 577, "relu")),
        "CompactLinear, two threads": (2, lambda: layer(x)),
        "a compact model": (1, lambda: logits(small, batch())),
        "a masked model": (1, lambda: logits(masked.eval(), batch())),
    }
    for name, (threads, call) in calls.items():
        torch.set_num_threads(threads)
        want = call().clone()
        torch.set_num_threads(1)
        for i in range(count):
            status = in_fork(partial(_again, call, want, threads), limit=LIMIT)
            outcome = "right" if status == 0 else "wrong" if status == 1 else "crashed"
            tally.add(outcome, f"{name}, {i}: {'hung' if status is None else f'status {status}'}")
        if not torch.equal(call(), want):
            tally.add("wrong", f"{name}: the parent answers otherwise afterwards")
    return tally


def _again(call: Callable[[], Tensor], want: Tensor, threads: int) -> None:
    torch.set_num_threads(threads)
    y = call()
    torch.set_num_threads(1)
    assert torch.equal(y, want)


def threads(calls: int, at_once: int = 8) -> Tally:
    """Python threads that call one module at the same time, while another gives it other weights and back."""
    tally = Tally("threads")
    small = small_model(share=0.3)
    layer = pk.nn.CompactLinear(torch.randn(57, 48) / 7, torch.randn(57))
    x, inputs = torch.randn(9, 48), batch()
    for name, module, call in (
        ("a layer", layer, lambda: layer(x)),
        ("a model", small, lambda: logits(small, inputs)),
    ):
        for replaces in (False, True):
            _at_once(tally, f"{name}{', weights replaced' if replaces else ''}", module, call, calls, at_once, replaces)
    return tally


def _at_once(
    tally: Tally, name: str, module: nn.Module, call: Callable[[], Tensor], calls: int, at_once: int, replaces: bool
) -> None:
    owner = next(m for m in module.modules() if isinstance(m, pk.nn.CompactLinear))
    weights = [owner.weight, nn.Parameter(owner.weight.detach() * 0.5, requires_grad=False)]
    answers = []
    for weight in weights[::-1]:
        owner.weight = weight
        answers.append(call().detach().clone())
    start, lock = threading.Barrier(at_once + replaces), threading.Lock()
    busy = threading.Event()

    def work() -> None:
        start.wait()
        for _ in range(calls):
            try:
                y = call()
                good = any(torch.equal(y, answer) for answer in (answers if replaces else answers[1:]))
                outcome, what = ("right", "") if good else ("wrong", f"{name}: an answer of neither weights")
            except Exception as error:
                outcome, what = "wrong", f"{name}: {type(error).__name__}: {error}"
            with lock:
                tally.add(outcome, what)

    def replace() -> None:
        start.wait()
        i = 0
        while not busy.is_set():
            i += 1
            owner.weight = weights[i % 2]

    workers = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    other = threading.Thread(target=replace, daemon=True)
    for thread in [*workers, other] if replaces else workers:
        thread.start()
    for thread in workers:
        thread.join(LIMIT)
    busy.set()
    if any(thread.is_alive() for thread in workers):
        tally.add("crashed", f"{name}: hung")
    if replaces:
        other.join(LIMIT)
    owner.weight = weights[0]
    if not torch.equal(call(), answers[1]):
        tally.add("wrong", f"{name}: another answer afterwards")


def run(seed: int, scratch: Path, few: bool) -> list[Tally]:
    """All three."""
    found = []
    for what, work in (
        ("full disks", lambda: full_disks(seed, 4 if few else 20, scratch)),
        ("forks", lambda: forks(2 if few else 10)),
        ("threads", lambda: threads(10 if few else 100)),
    ):
        progress.say(f"{what} ...")
        found.append(work())
    return found
