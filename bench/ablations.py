"""What makes learned masks better than simple rules? Each choice of the recipe, changed alone.

    python bench/ablations.py                    # all variants that are not done yet, then table and JSON
    python bench/ablations.py --shard 0/2        # every second run, to be started beside --shard 1/2
    python bench/ablations.py --only-report

Movie-review sentences, half of the block parameters removed, 250 steps of 32. Trained on 5,000 sentences of the
training split and scored on the other 2,072 and the validation split, so that the test split that bench/accuracy.py
scores on had no say in the recipe. One JSON a run in bench/results/ablations/.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import report
import torch
from ablation_parts import HardConcrete, Lagrangian, Teacher, shuffled_inside, sliced_by
from ablation_variants import BASE, VARIANTS, Variant
from datasets import concatenate_datasets, disable_progress_bars
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F
from transformers import set_seed

import prunekern as pk
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.recipe import load_dense

RUNS = report.RESULTS / "ablations"
TRAIN, MAX_LENGTH, MEGA = 5000, 64, 50


def batches_of(rows, size: int, seed: int):
    """Batches of rows of like length for ever: shuffled, sorted within MEGA batches, shuffled again."""
    rng = np.random.default_rng(seed)
    lengths = np.array(rows["length"])
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), size * MEGA):
            part = order[start : start + size * MEGA]
            part = part[np.argsort(lengths[part], kind="stable")]
            cuts = [part[i : i + size] for i in range(0, len(part), size)]
            for i in rng.permutation(len(cuts)):
                if len(cuts[i]) == size:
                    yield [rows[int(j)] for j in cuts[i]]


def rate(v: Variant, step: int) -> float:
    if v.second_rate is not None:
        return v.lr if step < v.stage_one else v.second_rate
    return v.lr * min(1.0, (step + 1) / (v.warmup + 1)) * (1 - step / v.steps)


def train(v: Variant, seed: int, dense, batches) -> tuple[pk.pruner.Pruner, dict]:
    """A plain loop, with what the variant changes."""
    flat = v.start == "flat"
    config = pk.PruneConfig(
        sparsity=v.share, seed=seed, warm_steps=0 if flat else v.warm, ramp_steps=v.ramp, spread=v.spread,
        temperature=v.temperature,
    )  # fmt: skip
    pruner = pk.attach(dense, config)
    if v.rule is not None:
        pruner.finalize("uniform", v.rule)
    masks = pruner.masks
    if v.noise == "hard concrete":
        for mask in masks.values():
            mask.__class__ = HardConcrete
    if v.biases:
        for layer in pruner.layers.values():
            layer.bias.requires_grad_(True)
    groups = pruner.param_groups(v.lr, v.mask_lr)
    optimizer = torch.optim.AdamW(groups[:1], weight_decay=0.0)
    logits = [mask.logits for mask in masks.values()]
    mask_optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[v.mask_optimizer](logits, v.mask_lr)
    budget = Lagrangian(pruner) if v.budget == "lagrangian" else None
    teacher = Teacher(pruner, v) if v.distil_logits or v.distil_hidden else None
    flips = []
    model = pruner.model.train()
    for step in range(v.steps):
        optimizer.param_groups[0]["lr"] = rate(v, step)
        batch = next(batches)
        out = model(**batch, output_hidden_states=v.distil_hidden > 0)
        loss = out.loss
        if teacher is not None and not pruner.warm:
            loss = loss + teacher.loss(out, batch)
        if budget is not None and not pruner.finalized and not pruner.warm:
            loss = loss + budget.penalty()
        optimizer.zero_grad()
        mask_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
        optimizer.step()
        if not (pruner.warm or pruner.finalized) and v.learn:
            mask_optimizer.step()
        was_warm = pruner.warm
        pruner.step()
        if was_warm and not pruner.warm and v.by == "kind":
            sliced_by(pruner)
        if pruner.finalized:
            continue
        if budget is not None:
            budget.ascend()
        if v.noise == "none" or step + 1 >= v.noise_off:
            for mask in masks.values():
                mask.noise.zero_()
        if not pruner.warm:
            flips.append(pruner.flips)
        if step + 1 == v.stage_one:
            if v.allocation == "random inside":
                shuffled_inside(pruner, seed)
            pruner.finalize()
    return pruner, {"flips": flips}


def run(name: str, v: Variant, seed: int) -> dict:
    disable_progress_bars()
    task = tasks.get("reviews")
    dense, tokenizer = load_dense(str(demo_model("mini-distilbert")), task, seed)
    encoded = task.encode(tokenizer, MAX_LENGTH)
    collate = task.collator(tokenizer)
    training = encoded["train"].select(range(TRAIN))
    held = concatenate_datasets([encoded["train"].select(range(TRAIN, len(encoded["train"]))), encoded["validation"]])
    set_seed(seed)
    batches = (collate(rows) for rows in batches_of(training, v.batch, seed))
    start = time.perf_counter()
    pruner, found = train(v, seed, dense, batches)
    seconds = time.perf_counter() - start
    model = pk.compact(pruner.model)
    order = np.argsort(held["length"], kind="stable")
    logits = torch.empty(len(order), 2)
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
        "seed": seed,
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "right": np.packbits((logits.argmax(1) == labels).numpy()).tobytes().hex(),
        "texts": len(labels),
        "removed": kept["sparsity"],
        "by_kind": kept["by_kind"],
        "kept": kept["kept"],
        "train_seconds": round(seconds, 1),
        "changed": {k: a for k, a in asdict(v).items() if a != asdict(BASE)[k]},
        **found,
    }


def summarise(out: str) -> None:
    runs: dict[str, dict[int, dict]] = {}
    for path in sorted(RUNS.glob("*.json")):
        one = json.loads(path.read_text())
        runs.setdefault(one["variant"], {})[one["seed"]] = one
    base, rows = runs.get("recipe", {}), []
    for name in VARIANTS:
        seeds = runs.get(name)
        if not seeds:
            continue
        shared = sorted(set(seeds) & set(base))
        against = np.mean([100 * (seeds[s]["accuracy"] - base[s]["accuracy"]) for s in shared]) if shared else None
        flips = [np.sum(r["flips"]) for r in seeds.values() if r["flips"]]
        rows.append(
            {
                "variant": name,
                "accuracy": f"{100 * np.mean([r['accuracy'] for r in seeds.values()]):.2f}",
                "loss": f"{np.mean([r['loss'] for r in seeds.values()]):.4f}",
                "minus_recipe": None if against is None or name == "recipe" else f"{against:+.2f}",
                "seeds": len(seeds),
                "flips": round(float(np.mean(flips))) if flips else None,
                "seconds": round(float(np.mean([r["train_seconds"] for r in seeds.values()]))),
            }
        )
    report.table("half of the block parameters removed, 2,572 held-out sentences", rows)
    report.write(out, rows=rows, recipe=asdict(BASE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--steps", type=int, default=0, help="for a quick try: fewer steps, nothing is written")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="ablations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    shard, shards = map(int, args.shard.split("/"))
    runs = [(name, seed) for seed in range(args.seeds) for name in (args.variant or VARIANTS)][shard::shards]
    console = Console()
    for name, seed in track(runs, description="runs", console=console, transient=True):
        path = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        if args.only_report or (path.exists() and not args.steps):
            continue
        v = replace(VARIANTS[name], steps=args.steps) if args.steps else VARIANTS[name]
        result = run(name, v, seed)
        console.print(f"{name}, seed {seed}: {100 * result['accuracy']:.2f} ({result['train_seconds']} s)")
        if not args.steps:
            _write(path, result)
    if shards == 1 and not args.steps:
        summarise(args.out)


def _write(path: Path, result: dict) -> None:
    path.with_suffix(".part").write_text(json.dumps(result) + "\n")
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
