"""What makes learned masks better than simple rules? Each choice of the recipe, changed alone.

    python -m bench.accuracy.ablations                    # all variants that are not done yet, then table and JSON
    python -m bench.accuracy.ablations --shard 0/2        # every second run, to be started beside --shard 1/2
    python -m bench.accuracy.ablations --task tweets      # instead of movie-review sentences
    python -m bench.accuracy.ablations --only-report

Half of the block parameters removed (17 % where the name says so), 250 steps of 32. Trained on a part of the training
split and scored on the rest of it and the validation split, so that the test split that bench.accuracy.compare scores
on had no say in the recipe. One JSON a run in bench/results/ablations/.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from torch.nn import functional as F
from transformers import set_seed

import prunekern as pk
from bench.accuracy.ablation_train import WarmStates, train
from bench.accuracy.ablation_variants import RECIPE, SMALL, VARIANTS, Variant
from bench.common import bits, progress, report
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.training.recipe import load_dense

RUNS = report.RESULTS / "ablations"
MAX_LENGTH = 64
# Rows of the training split to train on, and to score on beside the validation split.
ROWS = {"reviews": (range(5000), range(5000, 7072)), "tweets": (range(8000), range(30_000, 34_000))}


def run(name: str, v: Variant, seed: int, warm_states: WarmStates) -> dict:
    disable_progress_bars()
    task = tasks.get(v.task)
    dense, tokenizer = load_dense(str(demo_model("mini-distilbert")), task, seed)
    encoded = task.encode(tokenizer, MAX_LENGTH)
    collate = task.collator(tokenizer)
    train_rows, held_rows = ROWS[v.task]
    training = encoded["train"].select(train_rows)
    held = concatenate_datasets([encoded["train"].select(held_rows), encoded["validation"]])
    set_seed(seed)
    start = time.perf_counter()
    pruner, found = train(v, seed, dense, training, collate, warm_states)
    seconds = time.perf_counter() - start
    model = pk.compact(pruner.model)
    order = np.argsort(held["length"], kind="stable")
    logits = torch.empty(len(order), model.config.num_labels)
    with torch.inference_mode():
        for i in range(0, len(order), 64):
            part = order[i : i + 64]
            inputs = collate([held[int(j)] for j in part])
            inputs.pop("labels")
            logits[torch.from_numpy(part)] = model(**inputs).logits
    labels = torch.tensor(held["labels"])
    kept = pruner.report()
    return {
        "variant": name,
        "task": v.task,
        "seed": seed,
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "right": bits.packed(logits.argmax(1) == labels),
        "texts": len(labels),
        "removed": kept["sparsity"],
        "by_kind": kept["by_kind"],
        "kept": kept["kept"],
        "train_seconds": round(seconds, 1),
        "changed": {k: a for k, a in asdict(v).items() if a != asdict(RECIPE)[k]},
        **found,
    }


def summarise(out: str, seeds: int) -> None:
    """Of the first so many seeds, so that rows compare."""
    runs: dict[str, dict[str, dict[int, dict]]] = {}
    for one in report.read_runs(RUNS):
        if one["seed"] >= seeds:
            continue
        runs.setdefault(one["task"], {}).setdefault(one["variant"], {})[one["seed"]] = one
    tables = {task: rows_of(found) for task, found in runs.items()}
    for task, rows in tables.items():
        report.table(f"{task}, half (or 17 %) of the block parameters removed, held-out training texts", rows)
    report.write(out, **tables, recipe=asdict(RECIPE))


def rows_of(runs: dict[str, dict[int, dict]]) -> list[dict]:
    rows = []
    for name in VARIANTS:
        seeds = runs.get(name)
        if not seeds:
            continue
        base_name = "recipe" + SMALL * name.endswith(SMALL)
        base = runs.get(base_name, {})
        shared = sorted(set(seeds) & set(base))
        against = np.mean([100 * (seeds[s]["accuracy"] - base[s]["accuracy"]) for s in shared]) if shared else None
        flips = [np.sum(r["flips"]) for r in seeds.values() if r["flips"]]
        rows.append(
            {
                "variant": name,
                "accuracy": f"{100 * np.mean([r['accuracy'] for r in seeds.values()]):.2f}",
                "loss": f"{np.mean([r['loss'] for r in seeds.values()]):.4f}",
                "minus_recipe": None if against is None or name == base_name else f"{against:+.2f}",
                "seeds": len(seeds),
                "flips": round(float(np.mean(flips))) if flips else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--steps", type=int, default=0, help="for a quick try: fewer steps, nothing is written")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--task", default="reviews", choices=list(ROWS))
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="ablations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shard, shards = map(int, args.shard.split("/"))
    runs = [(name, seed) for name in (args.variant or VARIANTS) for seed in range(args.first_seed, args.seeds)][
        shard::shards
    ]
    warm_states = WarmStates()
    for name, seed in progress.track(runs, "runs"):
        path = RUNS / f"{args.task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        if args.only_report or (path.exists() and not args.steps):
            continue
        v = replace(VARIANTS[name], task=args.task)
        v = replace(v, steps=args.steps) if args.steps else v
        result = run(name, v, seed, warm_states)
        progress.say(f"{name}, seed {seed}: {100 * result['accuracy']:.2f} ({result['train_seconds']} s)")
        if not args.steps:
            report.write_file(path, result, indent=None)
    if shards == 1 and not args.steps:
        summarise(args.out, args.seeds)


if __name__ == "__main__":
    main()
