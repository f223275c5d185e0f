"""What do 8 bits cost real models, and what do smoothing and held layers bring back?

    python -m bench.accuracy.calibration --demo runs/demo       # table and bench/results/calibration.json

SmolLM2-135M (dequantised), nothing removed: perplexity on BBC articles in blocks of 128 tokens, calibrated on other
articles; the error beside it is that of the paired differences of the tokens' losses. The demo's compact model, a
quarter removed: accuracy on the test sentences, calibrated on training sentences, and the share of predictions that
stay as in fp32. `--quick` takes few texts and shows that it runs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekern as pk
from bench.common import report
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.training.recipe import evaluate

BLOCK = 128
# weights, smooths, least_db (-1000: nothing is held in more bits; None: the default); no entry: not calibrated at all
LANGUAGE = {
    "fp32": None,
    "int8, x left in fp32": ("int8", "float", False, -1000.0),
    "int8": ("int8", "auto", False, -1000.0),
    "int8, smoothed": ("int8", "auto", True, -1000.0),
    **{f"int8, smoothed, {db:g} dB": ("int8", "auto", True, db) for db in (32.0, 33.0, 34.0)},
    "int8, 30 dB": ("int8", "auto", False, 30.0),
}
SENTENCES = {
    "fp32": None,
    "int8, x left in fp32": ("int8", "float", False, -1000.0),
    "int8": ("int8", "auto", False, -1000.0),
    "int8, as chosen": ("int8", "auto", True, None),
    "int8, 34 dB": ("int8", "auto", False, 34.0),
}


def whole(folder: Path, out: Path) -> Path:
    """SmolLM2 as a compact model of which nothing was removed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pruner = pk.attach(model, pk.PruneConfig(rank=1, sparsity=0.0))
    with torch.no_grad():
        for mask in pruner.masks.values():
            mask.logits.fill_(1.0)
    pk.save(pk.compact(model), out / "whole")
    return out / "whole"


def blocks(tokenizer, texts, count: int) -> torch.Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * BLOCK:
            break
    return torch.tensor(ids[: count * BLOCK]).view(-1, BLOCK)


@torch.inference_mode()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    parts = []
    for batch in ids.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        parts.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return torch.cat(parts)


def calibrated(folder: Path, batches: list, how, rows: int):
    """The model, the calibration or None, and how long that took."""
    model, found, start = pk.load(folder), None, time.perf_counter()
    if how is not None:
        weights, activations, smooths, least_db = how
        found = pk.calibrate(model, batches, least_db, weights, activations, rows, smooths=smooths)
    return model, found, time.perf_counter() - start


def row_of(name: str, found, seconds: float) -> dict:
    db = [] if found is None else sorted(layer.db for layer in found.layers)
    return {
        "held as": name,
        "worst layer, dB": None if not db else round(db[0], 1),
        "median": None if not db else round(db[len(db) // 2], 1),
        "in more bits": None if found is None else f"{len(found.held)} of {len(found.layers)}",
        "seconds": round(seconds, 1),
    }


def language(args, out: Path) -> list[dict]:
    folder = Path(demo_model("smollm2-135m"))
    tokenizer, text = AutoTokenizer.from_pretrained(folder), tasks.get("topics").splits
    scored = blocks(tokenizer, text["test"]["sentence"], 4 if args.quick else 96)
    batches = [{"input_ids": b} for b in blocks(tokenizer, text["train"]["sentence"], 8).split(4)]
    compact, base, rows = whole(folder, out), None, []
    for name, how in list(LANGUAGE.items())[: 4 if args.quick else None]:
        model, found, seconds = calibrated(compact, batches, how, 64 if args.quick else 1024)
        loss = losses(model, scored)
        base = loss if base is None else base
        more = loss - base
        rows.append(
            row_of(name, found, seconds)
            | {"perplexity": round(math.exp(loss.mean()), 2), "more, %": round(100 * math.expm1(more.mean()), 2)}
            | {"+-": round(100 * float(more.std()) / len(more) ** 0.5, 2)}
        )
        print(rows[-1], flush=True)
        del model
    return rows


def sentences(args) -> list[dict]:
    folder, task = args.demo / "compact", tasks.get("reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.quick:
        task = task.take(test=64)
    train, collate = task.encode(tokenizer, 64)["train"], task.collator(tokenizer)
    batches = [collate([train[i] for i in range(at, at + 32)]) for at in range(0, 256, 32)]
    base, rows = None, []
    for name, how in SENTENCES.items():
        model, found, seconds = calibrated(folder, batches, how, 4096)
        metrics, logits = evaluate(model, tokenizer, task, 64)
        base = logits if base is None else base
        same = float((logits.argmax(1) == base.argmax(1)).float().mean())
        accuracy = round(100 * metrics["accuracy"], 2)
        rows.append(row_of(name, found, seconds) | {"accuracy": accuracy, "same, %": round(100 * same, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of `prunekern demo`; without it the demo's model is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    if args.demo is not None:
        found["movie-review sentences"] = sentences(args)
        report.table("The demo's model, a quarter removed", found["movie-review sentences"])
    with tempfile.TemporaryDirectory() as out:
        found["BBC articles"] = language(args, Path(out))
    report.table("SmolLM2-135M, dequantised, nothing removed", found["BBC articles"])
    if not args.quick:
        report.write("calibration", **found)


if __name__ == "__main__":
    main()
