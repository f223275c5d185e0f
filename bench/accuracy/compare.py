"""What accuracy does removal cost, beside full fine-tuning, LoRA, DoRA and simple rules of pruning?

    python -m bench.accuracy.compare                    # all runs that are not done yet, then table, JSON and plots
    python -m bench.accuracy.compare --only-report      # from the runs that are there, of --seeds and --more-seeds
    python -m bench.accuracy.compare --shard 0/2        # every second run, to be started beside --shard 1/2; no report

Three tasks, three seeds, five for the methods that are compared most. Every run takes the same steps, batches, seeds
and learning rates (full fine-tuning has a twentieth), and is scored on the same test texts. One JSON a run in
bench/results/accuracy/, so that an interrupted sitting goes on where it stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import Trainer, set_seed

import prunekern as pk
from bench.accuracy.tables import METHODS, RUNS, summarise
from bench.common import bits, progress, report
from bench.common.rules import LoraGradient
from bench.common.training import train
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.training.recipe import TrainOptions, evaluate, load_dense, training_arguments
from prunekern.training.trainer import SCHEDULE

TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
SHAPES = {"reviews": (64, 32), "topics": (128, 8), "tweets": (64, 32)}  # most tokens, batch; topics are long
MORE_SEEDS = ("DoRA", "random, uniform", "saliency, balanced", "ours")
FULL_RATE = 0.05  # of the adapters' learning rate, for all weights


def train_peer(name: str, dense, encoded, task, tokenizer, options, out: Path):
    """Full fine-tuning, or PEFT's LoRA or DoRA on the same six linears, with PruneTrainer's learning rates."""
    from peft import LoraConfig, get_peft_model

    rate = options.learning_rate
    if name == "full fine-tuning":
        model, rate = dense, FULL_RATE * rate
    else:
        head = ["pre_classifier", "classifier"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=head, use_dora=name == "DoRA")
        model = get_peft_model(dense, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    warmup, steps = options.warmup_steps, options.max_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps)
    )
    trainer = Trainer(
        model=model,
        args=training_arguments(options, out, save_strategy="no"),
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
        optimizers=(optimizer, schedule),
    )
    train(trainer, name)
    return model, {}


def train_pruned(name: str, share: float, dense, encoded, task, tokenizer, options, out: Path, seed: int):
    """Masks learned, or chosen by a rule: before the first step, or after the steps that gather what it ranks by."""
    paper = name == "ours, paper setting"
    config = pk.PruneConfig(sparsity=share, seed=seed, preset="paper" if paper else "full")
    pruner = pk.attach(dense, config)
    rule, callbacks = {}, []
    if paper:  # masks on q and v, flat logits, two constant learning rates, in the paper's proportion
        rule = {"final_learning_rate": 0.2 * options.learning_rate}
    elif name == "saliency, balanced":
        rule = {"rule": "uniform", "criterion": "saliency"}
    elif name == "LoRA gradient":
        callbacks = [LoraGradient(pruner)]
        rule = {"rule": "uniform", "criterion": callbacks[0].scores}
    elif name != "ours":
        pruner.finalize("uniform", name.split(",")[0])
    if "rule" in rule:  # fixed as soon as our own masks begin to close
        rule |= {"stage_one": SCHEDULE["stage_one"] * SCHEDULE["warm"], "warm": 0.999}
    trainer = pk.PruneTrainer(
        args=training_arguments(options, out, save_strategy="no"),
        pruner=pruner,
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
        callbacks=callbacks,
        **rule,
    )
    train(trainer, name)
    pruner.shrink()
    kept = {c: bits.packed(m.kept()) for c, m in pruner.masks.items()}
    flips = [e["flips"] for e in trainer.state.log_history if "flips" in e]
    found = {"removed": pruner.sparsity(), "by_kind": pruner.report()["by_kind"], "kept": kept, "flips": flips}
    return pk.compact(pruner.model), found


def run(task_name: str, name: str, share: float, seed: int, args, out: Path) -> dict:
    max_length, batch = SHAPES[task_name]
    options = TrainOptions(
        max_steps=args.steps,
        batch_size=batch,
        learning_rate=args.lr,
        warmup_steps=args.warmup,
        max_length=max_length,
        seed=seed,
    )
    task = tasks.get(task_name).take(train=args.steps * batch)
    dense, tokenizer = load_dense(str(demo_model(args.model)), task, seed)
    disable_progress_bars()
    encoded = task.encode(tokenizer, max_length)
    set_seed(seed)
    start = time.perf_counter()
    common = (dense, encoded, task, tokenizer, options, out)
    model, found = train_peer(name, *common) if share == 0 else train_pruned(name, share, *common, seed)
    seconds = time.perf_counter() - start
    metrics, logits = evaluate(model, tokenizer, task, max_length)
    labels = np.array(task.splits[task.score_split]["label"])
    right = logits.argmax(1).numpy() == labels
    return {
        "task": task_name,
        "task_name": task.name,
        "method": name,
        "share": share,
        "removed": 0.0,
        "seed": seed,
        "accuracy": metrics["accuracy"],
        "loss": float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))),
        "right": bits.packed(right),  # one bit a test text, for paired intervals
        "texts": len(right),
        "train_seconds": round(seconds, 1),
        "options": options.__dict__,
        "model": args.model,
        **found,
    }


def wanted(seeds: int, more_seeds: int) -> list[tuple[str, str, float, int]]:
    """(task, method, share, seed) of all runs, seed by seed, so that every sitting leaves a table that compares."""
    return [
        (task, name, share, seed)
        for seed in range(max(seeds, more_seeds))
        for task in SHAPES
        for name, shares in METHODS.items()
        for share in shares
        if seed < (more_seeds if name in MORE_SEEDS else seeds)
    ]


def path_of(task: str, name: str, share: float, seed: int) -> Path:
    return RUNS / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{round(100 * share)}-{seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--more-seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--model", default="mini-distilbert")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="these only")
    parser.add_argument("--task", action="append", choices=list(SHAPES), help="run and report these only")
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="accuracy")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shard, shards = map(int, args.shard.split("/"))
    runs = [
        r
        for r in wanted(args.seeds, args.more_seeds)
        if (not args.method or r[1] in args.method) and (not args.task or r[0] in args.task)
    ][shard::shards]
    for i, one in enumerate(runs):
        path, label = path_of(*one), "{} {} {:.0%} seed {}".format(*one)
        if path.exists() or args.only_report:
            continue
        progress.say(f"run {i + 1} of {len(runs)}: {label}")
        with tempfile.TemporaryDirectory() as scratch:
            result = run(*one, args, Path(scratch))
        report.write_file(path, result, indent=None)
        progress.say(f"{label}: {100 * result['accuracy']:.2f} ({result['train_seconds']} s)")
    if shards == 1:
        summarise(args.out, args.task, {m: args.more_seeds if m in MORE_SEEDS else args.seeds for m in METHODS})


if __name__ == "__main__":
    main()
