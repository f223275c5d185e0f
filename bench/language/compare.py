"""What does removal cost a language model? Perplexity and multiple choice, beside simple rules of pruning.

    python -m bench.language.compare                  # all runs that are not done yet, then table, JSON and plot; hours
    python -m bench.language.compare --only-report    # from the runs that are there
    python -m bench.language.compare --method ours --share 0.2 --keep /tmp/ours    # and keep the compact model's folder

SmolLM2-135M, dequantised. Every run takes the same 200,000 tokens in the same order: half of them Wikipedia paragraphs,
a quarter WinoGrande sentences with the right thing in the blank, a quarter science questions with their answers.
Scored on test splits: perplexity on Wikipedia (blocks of the training's length), accuracy on items by log-likelihood.
One JSON a run in bench/results/language/, so that an interrupted sitting goes on where it stopped.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from transformers import set_seed

import prunekern as pk
from bench.common import bits, progress, report, training
from bench.common.rules import LoraGradient, taylor
from bench.language import tables
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.tasks.language import language_task
from prunekern.training.recipe import TrainOptions, evaluate, load_dense, training_arguments
from prunekern.training.trainer import SCHEDULE

MIXTURE = {"wikipedia": 0.5, "winogrande": 0.25, "science": 0.25}  # of the training tokens
ITEMS = ("winogrande", "science")
CALIBRATION = 10  # blocks that Taylor's gradients are of, as LLM-Pruner takes sentences


def as_text(name: str):
    """The task's running text: of items, each with its right choice."""
    task = tasks.get(name)
    if isinstance(task, tasks.LanguageTask):
        return task
    told = {
        split: [row["contexts"][row["label"]] + row["continuations"][row["label"]] for row in rows]
        for split, rows in task.splits.items()
    }
    return language_task(task.name, told)


def blocks(tokenizer, count: int, length: int):
    """`count` training blocks of the mixture."""
    parts = []
    for name, share in MIXTURE.items():
        encoded = as_text(name).encode(tokenizer, length)["train"]
        wanted = round(share * count)
        if len(encoded) < wanted:
            raise SystemExit(f"{name}: {len(encoded)} blocks of {length} tokens, {wanted} wanted")
        parts.append(encoded.select(range(wanted)))
    return concatenate_datasets(parts)


def score(model, tokenizer, length: int, items: int) -> dict:
    """Perplexity, and which items were answered right."""
    progress.say("  scoring: wikipedia")
    metrics, _ = evaluate(model, tokenizer, tasks.get("wikipedia").take(test=items), length)
    found = {**metrics, "right": {}, "accuracy": {}, "items": {}}
    for name in ITEMS:
        progress.say(f"  scoring: {name}")
        task = tasks.get(name).take(test=items)
        metrics, choices = evaluate(model, tokenizer, task)
        right = choices.argmax(1).numpy() == np.array(task.splits["test"]["label"])
        found["accuracy"][name], found["items"][name] = metrics["accuracy"], len(right)
        found["right"][name] = bits.packed(right)  # one bit an item, for paired intervals
    return found


def run(name: str, share: float, args, out: Path) -> dict:
    wikipedia = tasks.get("wikipedia")
    dense, tokenizer = load_dense(str(demo_model("smollm2-135m")), wikipedia, args.seed)
    disable_progress_bars()
    if name == tables.UNTRAINED:
        return {"method": name, "share": 0.0, "seed": args.seed, **score(dense, tokenizer, args.length, args.items)}
    steps = round(args.tokens / (args.batch * args.length))
    train = blocks(tokenizer, steps * args.batch, args.length)
    options = TrainOptions(
        max_steps=steps,
        batch_size=args.batch,
        learning_rate=args.lr,
        warmup_steps=args.warmup,
        max_length=args.length,
        seed=args.seed,
    )
    collate = wikipedia.collator(tokenizer)
    pruner = pk.attach(dense, pk.PruneConfig(sparsity=share, seed=args.seed))
    rule, callbacks = {}, []
    if name == "saliency, balanced":
        rule = {"rule": "uniform", "criterion": "saliency"}
    elif name == "LoRA gradient":
        callbacks = [LoraGradient(pruner)]
        rule = {"rule": "uniform", "criterion": callbacks[0].scores}
    elif name == "Taylor":
        untrained, _ = load_dense(str(demo_model("smollm2-135m")), wikipedia, args.seed)
        chosen = train.shuffle(seed=args.seed).select(range(CALIBRATION))
        scores = taylor(untrained, pruner.table, (collate([row]) for row in chosen))
        del untrained
        pruner.finalize("uniform", scores)
    elif name in ("random", "magnitude"):
        pruner.finalize("uniform", name)
    if "rule" in rule:  # fixed as soon as our own masks begin to close
        rule |= {"stage_one": SCHEDULE["stage_one"] * SCHEDULE["warm"], "warm": 0.999}
    set_seed(args.seed)
    trainer = pk.PruneTrainer(
        args=training_arguments(options, out, save_strategy="no"),
        pruner=pruner,
        train_dataset=train,
        data_collator=collate,
        callbacks=callbacks,
        **rule,
    )
    start = time.perf_counter()
    training.train(trainer, name)
    seconds = time.perf_counter() - start
    small = pk.compact(pruner.model)
    if args.keep:
        pk.save(small, args.keep)
        tokenizer.save_pretrained(args.keep)
    return {
        "method": name,
        "share": share,
        "seed": args.seed,
        "removed": pruner.sparsity(),
        "by_kind": pruner.report()["by_kind"],
        "kept": {c: [int(k) for k in kept] for c, kept in pruner.report()["kept"].items()},
        "tokens": steps * args.batch * args.length,
        "train_seconds": round(seconds, 1),
        "options": options.__dict__,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        **score(small, tokenizer, args.length, args.items),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--items", type=int, default=1000, help="of each test split")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--method", action="append", choices=list(tables.METHODS), help="these only")
    parser.add_argument("--share", action="append", type=float, help="these only")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--keep", type=Path, help="folder for the compact model of the one run that is chosen")
    parser.add_argument("--runs", type=Path, default=tables.RUNS, help="folder of the runs")
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="language")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shard, shards = map(int, args.shard.split("/"))
    wanted = [
        (name, share)
        for name, shares in tables.METHODS.items()
        for share in shares
        if (not args.method or name in args.method) and (not args.share or share in args.share)
    ][shard::shards]
    if args.keep and len(wanted) != 1:
        raise SystemExit("--keep goes with one --method and one --share")
    for name, share in wanted:
        path = tables.path_of(args.runs, name, share, args.seed)
        if path.exists() or args.only_report:
            continue
        label = f"{name} {share:.0%} seed {args.seed}"
        progress.say(f"{label} runs")
        with tempfile.TemporaryDirectory() as scratch:
            result = run(name, share, args, Path(scratch))
        report.write_file(path, result, indent=None)
        shown = ", ".join(f"{n} {100 * a:.1f}" for n, a in result["accuracy"].items())
        progress.say(f"{label}: perplexity {result['perplexity']:.2f}, {shown}")
    if shards == 1:
        tables.summarise(args.runs, args.out)


if __name__ == "__main__":
    main()
