"""What do 8 bits and 4 cost real models, and what does `calibrate` bring back?

    prunekern train --model smollm2-135m --task wikipedia --sparsity 0.2 --max-steps 80 --batch-size 4 --lr 1e-3 \\
        --bf16 --out runs/smollm2-20                            # ~12 minutes on one thread, and as long to score
    make demo                                                   # runs/demo
    python -m bench.accuracy.calibration --language runs/smollm2-20/compact --demo runs/demo

Tables, and bench/results/calibration.json. SmolLM2-135M (dequantised), a fifth removed, or with `--language whole`
nothing: perplexity on Wikipedia paragraphs in blocks of 128 tokens, calibrated on other articles; the error beside it
is that of the paired differences of the tokens' losses. MB are what a token reads: weights of block linears and head.
The demo's compact model, a quarter removed: accuracy on the test sentences, calibrated on training sentences, and the
share of predictions that stay as in fp32. Each is left out where its folder is not given. `--quick` takes few texts and
shows that it runs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
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
NOTHING = -1000.0  # dB that all layers have


@dataclass(frozen=True)
class How:
    """Weights, x, and how they are calibrated: not at all; least_db, None for the default."""

    weights: str
    activations: str = "auto"
    calibrated: bool = False
    least_db: float | None = None


LANGUAGE = {
    "fp32": How("fp32"),
    "int8": How("int8"),
    "int8, x in fp32": How("int8", "float"),
    "int8, calibrated": How("int8", calibrated=True),
    "int8, smoothed only": How("int8", calibrated=True, least_db=NOTHING),
    "int8, 33 dB": How("int8", calibrated=True, least_db=33.0),
    "int4": How("int4"),
    "int4, x in fp32": How("int4", "float"),
    "int4, calibrated": How("int4", calibrated=True),
    "int4, smoothed and compensated only": How("int4", calibrated=True, least_db=NOTHING),
}
SENTENCES = {name: how for name, how in LANGUAGE.items() if name != "int8, 33 dB"}


def whole(folder: Path, out: Path) -> Path:
    """SmolLM2 as a compact model of which nothing was removed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pruner = pk.attach(model, pk.PruneConfig(rank=1, sparsity=0.0))
    with torch.no_grad():
        for mask in pruner.masks.values():
            mask.logits.fill_(1.0)
    pk.save(pk.compact(model), out / "whole")
    return out / "whole"


@torch.inference_mode()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    parts = []
    for batch in ids.split(8):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        parts.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return torch.cat(parts)


def held(folder: Path, batches: list, how: How, rows: int):
    """The model, the calibration or None, and how long that took."""
    if not how.calibrated:
        return pk.load(folder, weights=how.weights, activations=how.activations), None, None
    model, start = pk.load(folder), time.perf_counter()
    found = pk.calibrate(model, batches, how.least_db, how.weights, how.activations, rows)
    return model, found, round(time.perf_counter() - start, 1)


def megabytes(model) -> float:
    """What one token reads of weights: of block linears and head."""
    layers = [m for m in model.modules() if isinstance(m, pk.nn.CompactLinear)]
    tensors = [t for layer in layers for t in (layer.weight, layer.scale) if t is not None]
    return round(sum(t.numel() * t.element_size() for t in tensors) / 1e6, 1)


def row_of(name: str, model, found, seconds) -> dict:
    kinds = Counter(layer.held for layer in found.layers) if found is not None else {}
    db = [] if found is None else sorted(layer.held_db for layer in found.layers)
    return {
        "held as": name,
        "layers in": "; ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or None,
        "MB": megabytes(model),
        "median dB": None if not db else round(db[len(db) // 2], 1),
        "estimate, nats": None if found is None or found.nats is None else round(found.nats, 4),
        "seconds": seconds,
    }


def language(args, out: Path) -> list[dict]:
    dense = Path(demo_model("smollm2-135m"))
    compact = whole(dense, out) if str(args.language) == "whole" else args.language
    encoded = tasks.get("wikipedia").encode(AutoTokenizer.from_pretrained(dense), BLOCK)
    scored = torch.tensor(encoded["test"][: 4 if args.quick else args.blocks]["input_ids"])
    rows = 64 if args.quick else args.rows
    texts = torch.tensor(encoded["train"][: -(-rows // BLOCK)]["input_ids"])
    batches, base, table = [{"input_ids": b} for b in texts.split(8)], None, []
    for name, how in LANGUAGE.items():
        if args.only and name not in ("fp32", *args.only):
            continue
        model, found, seconds = held(compact, batches, how, rows)
        loss = losses(model, scored)
        base = loss if base is None else base
        more = loss - base
        table.append(
            row_of(name, model, found, seconds)
            | {"perplexity": round(math.exp(loss.mean()), 2), "more, %": round(100 * math.expm1(more.mean()), 2)}
            | {"+-": round(100 * float(more.std()) / len(more) ** 0.5, 2)}
        )
        print(table[-1], flush=True)
        del model
    return table


def sentences(args) -> list[dict]:
    folder, task = args.demo / "compact", tasks.get("reviews")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.quick:
        task = task.take(test=64)
    train, collate = task.encode(tokenizer, 64)["train"], task.collator(tokenizer)
    batches = [collate([train[i] for i in range(at, at + 32)]) for at in range(0, 256, 32)]
    base, table = None, []
    for name, how in SENTENCES.items():
        model, found, seconds = held(folder, batches, how, 4096)
        metrics, logits = evaluate(model, tokenizer, task, 64)
        base = logits if base is None else base
        same = float((logits.argmax(1) == base.argmax(1)).float().mean())
        accuracy = round(100 * metrics["accuracy"], 2)
        table.append(row_of(name, model, found, seconds) | {"accuracy": accuracy, "same, %": round(100 * same, 2)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of `prunekern demo`; without it the demo's model is left out")
    parser.add_argument("--language", type=Path, help="folder of a compact SmolLM2-135M, or whole")
    parser.add_argument("--only", action="append", choices=list(LANGUAGE), help="these rows, and fp32; of language")
    parser.add_argument("--blocks", type=int, default=96, help="that are scored, of 128 tokens")
    parser.add_argument("--rows", type=int, default=4096, help="that each layer is calibrated on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.demo is None and args.language is None:
        parser.error("--demo or --language must be given; --help says what makes these folders")
    found = {}
    if args.demo is not None:
        found["movie-review sentences"] = sentences(args)
        report.table("The demo's model, a quarter removed", found["movie-review sentences"])
    if args.language is not None:
        with tempfile.TemporaryDirectory() as out:
            found["Wikipedia paragraphs"] = language(args, Path(out))
        report.table(f"SmolLM2-135M, dequantised: {args.language}", found["Wikipedia paragraphs"])
    if not args.quick:
        report.write("calibration", **found, blocks=args.blocks, rows=args.rows)


if __name__ == "__main__":
    main()
