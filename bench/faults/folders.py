"""Damaged folders: refused in words, or loaded as what they say. In one process; a huge size is an error in it."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import signal
import struct
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prunekern as pk
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import attached, batch, build, logits, prune

from ..common import progress
from .tally import Tally, is_refusal

REFUSALS = (ValueError, OSError, RuntimeError, TypeError, NotImplementedError, ImportError)
MEMORY = 2 << 30  # bytes of addresses above those in use
SECONDS = 10  # to load a model of 100 KB: longer is a size that was believed, and filled
HUGE = (0, -1, 1, 2**31, 2**40, 2**62, 10**30, 1e308, 1.5, True, None, "8", [], {}, [1], float("nan"))
Files = dict[str, bytes]


def damaged(rng: random.Random, files: Files, other: Files) -> tuple[str, Files]:
    """What was done, and the files after it. other: of a sound folder of another model, to take files from."""
    name = rng.choice(sorted(files))
    found = dict(files)
    kind = rng.choice(KINDS)
    return f"{name}: {kind.__name__[1:]}", kind(rng, found, name, other)


def _flipped(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    raw = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return files | {name: bytes(raw)}


def _header_flipped(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    name = next(n for n in files if n.endswith(".safetensors"))
    raw = bytearray(files[name])
    raw[rng.randrange(8 + struct.unpack("<Q", raw[:8])[0])] ^= 1 << rng.randrange(8)
    return files | {name: bytes(raw)}


def _cut(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    return files | {name: files[name][: rng.randrange(len(files[name]))]}


def _longer(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    return files | {name: files[name] + rng.randbytes(rng.choice((1, 8, 4096)))}


def _zeroed(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    first = rng.randrange(len(files[name]))
    count = min(len(files[name]) - first, 4096)  # a block of a disk
    return files | {name: files[name][:first] + bytes(count) + files[name][first + count :]}


def _gone(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    return {n: raw for n, raw in files.items() if n != name}


def _swapped(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    return files | {name: other[name]}


def _mixed_up(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    return files | {name: files[rng.choice(sorted(files))]}


def _edited(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    """A value somewhere in a JSON file is another one."""
    name = next(n for n in sorted(files) if n.endswith("config.json"))
    content = json.loads(files[name])
    places = list(_places(content))
    holder, key = rng.choice(places)
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = rng.choice(HUGE)
    return files | {name: json.dumps(content).encode()}


def _nested(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    name = next(n for n in sorted(files) if n.endswith("config.json"))
    deep = b"[" * 100_000 + b"]" * 100_000
    return files | {name: deep if rng.random() < 0.5 else files[name].replace(b": ", b": " + deep + b", ", 1)}


def _huge_header(rng: random.Random, files: Files, name: str, other: Files) -> Files:
    """A tensor's shape, offsets or dtype, or the header's length, is another one."""
    name = next(n for n in files if n.endswith(".safetensors"))
    raw = files[name]
    length = struct.unpack("<Q", raw[:8])[0]
    if rng.random() < 0.2:
        return files | {name: struct.pack("<Q", rng.choice((0, 1, length - 1, 2**40, 2**63, 2**64 - 1))) + raw[8:]}
    header = json.loads(raw[8 : 8 + length])
    entry = header[rng.choice([n for n in header if n != "__metadata__"])]
    if rng.random() < 0.3:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "I8", "BOOL", "X", "", None, 3))
    else:
        part = entry[rng.choice(("shape", "data_offsets"))]
        if part:
            part[rng.randrange(len(part))] = rng.choice((0, -1, 1, 2**31, 2**62, 2**64, 1.5, None, "4"))
    text = json.dumps(header).encode()
    return files | {name: struct.pack("<Q", len(text)) + text + raw[8 + length :]}


KINDS = (_flipped, _header_flipped, _cut, _longer, _zeroed, _gone, _swapped, _mixed_up, _edited, _edited, _edited,
         _nested, _huge_header)  # fmt: skip


def _places(content: Any) -> Any:
    """(holder, key) of everything in a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def _read(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "README.md"}


def _put(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


class TooLongError(BaseException):
    """Not to be caught by what is being tried."""


def _too_long(*args: Any) -> None:
    raise TooLongError(f"took longer than {SECONDS} s")


@contextmanager
def _little_memory() -> Any:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _says(file: Path, state: dict[str, Tensor]) -> bool:
    """Whether a model holds, bit for bit, what a plain read of the file gives."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        t = state.get(name)
        if t is None or list(t.shape) != entry["shape"]:
            return False
        if entry["dtype"] != "F32" or t.dtype is not torch.float32:  # read as another dtype: the shape is all
            continue
        if t.contiguous().numpy().tobytes() != body[first:last]:
            return False
    return True


def _try(tally: Tally, what: str, folder: Path, same: bool, load: Callable[[], Any], answer: Tensor, file: str) -> None:
    """same: whether only JSON that a model need not follow, or nothing, differs: the answer is then the old one."""
    try:
        with _little_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load()
    except (Exception, TooLongError) as error:
        good = is_refusal(error, REFUSALS)
        return tally.add("refused" if good else "wrong", f"{what}: {type(error).__name__}: {error}")
    try:
        y = logits(model, batch())
    except Exception as error:
        return tally.add("wrong", f"{what}: loads, and fails when called: {type(error).__name__}: {error}")
    if torch.equal(y, answer):
        return tally.add("right")  # harmless
    if not same and _says(folder / file, model.state_dict()):
        return tally.add("right")  # what the file says
    return tally.add("wrong", f"{what}: loads with another answer than its files give")


def run(seed: int, count: int, scratch: Path) -> list[Tally]:
    """Half of `count` of a compact model's folder, half of an adapter's."""
    rng = random.Random(seed)
    answers, folders = [], []
    for number, share in enumerate((0.5, 0.3)):
        small = small_model(share=share)
        pk.save(small, scratch / f"compact{number}")
        masked = build(seed=number)
        pruner = prune(attached(masked, seed=number), share)
        pk.save_adapter(pruner, scratch / f"adapter{number}")
        folders.append([_read(scratch / f"{kind}{number}") for kind in ("compact", "adapter")])
        answers.append([logits(small, batch()), logits(masked.eval(), batch())])
    dense, folder = build(seed=0), scratch / "damaged"
    tallies = [Tally("damaged compact models"), Tally("damaged adapters")]

    def adapter() -> Any:
        model = copy.deepcopy(dense)
        pk.load_adapter(model, folder)
        return model.eval()

    loads = (lambda: pk.load(folder), adapter)
    for which in (0, 1):
        with progress.bar(tallies[which].kind) as tell:
            for i in range(count // 2):
                tell(i / (count // 2))
                what, files = damaged(rng, folders[0][which], folders[1][which])
                _put(folder, files)
                file = ("model.safetensors", "adapter.safetensors")[which]
                same = files == folders[0][which]
                _try(tallies[which], f"{i}: {what}", folder, same, loads[which], answers[0][which], file)
    return tallies
