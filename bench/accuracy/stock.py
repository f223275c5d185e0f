"""What accuracy does it cost that stock transformers loads the result? Rule "stock" against the ragged, learned one.

    python -m bench.accuracy.stock                       # two runs of 250 steps, table and bench/results/stock.json

Both runs have the same seed, steps and batches, and remove the same share; up to the stage boundary they are one run.
Scored is what a user would deploy: the compact model loaded by prunekern, and the stock folder as transformers alone
loads it. Intervals are paired by text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import AutoModelForSequenceClassification, set_seed

import prunekern as pk
from bench.accuracy.compare import SHAPES
from bench.accuracy.tables import paired
from bench.common import bits, report
from bench.common.training import train
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.exporting.stock import save_stock
from prunekern.training.recipe import TrainOptions, evaluate, load_dense, training_arguments

RULES = ("learned", "stock")


def deployed(rule: str, model, folder: Path):
    """The fine-tuned model from disk, in the form that its rule is for."""
    if rule == "stock":
        save_stock(model, folder)
        return AutoModelForSequenceClassification.from_pretrained(folder)
    pk.save(pk.compact(model), folder)
    return pk.load(folder)


def run(rule: str, args, task, max_length: int, batch: int, out: Path) -> dict:
    options = TrainOptions(
        max_steps=args.steps,
        batch_size=batch,
        learning_rate=args.lr,
        warmup_steps=args.warmup,
        max_length=max_length,
        seed=args.seed,
    )
    dense, tokenizer = load_dense(str(demo_model(args.model)), task, args.seed)
    disable_progress_bars()
    encoded = task.encode(tokenizer, max_length)
    set_seed(args.seed)
    pruner = pk.attach(dense, pk.PruneConfig(sparsity=args.sparsity, align=args.align, seed=args.seed))
    pruner.check_rule(rule)
    trainer = pk.PruneTrainer(
        args=training_arguments(options, out / "checkpoints", save_strategy="no"),
        pruner=pruner,
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
        rule=rule,
    )
    train(trainer, rule)
    model = deployed(rule, pruner.model.eval(), out / "model")
    metrics, logits = evaluate(model, tokenizer, task, max_length)
    labels = np.array(task.splits[task.score_split]["label"])
    right = logits.argmax(1).numpy() == labels
    weights = (out / "model" / "model.safetensors").stat().st_size
    return {
        "rule": rule,
        **trainer.report,
        "accuracy": metrics["accuracy"],
        "loss": float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))),
        "right": bits.packed(right),  # one bit a test text, for paired intervals
        "texts": len(right),
        "bytes": weights,
        "options": options.__dict__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="reviews", choices=list(SHAPES))
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--align", type=int, default=1)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="mini-distilbert")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default="stock", help="name in bench/results, or an absolute path without .json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    max_length, batch = SHAPES[args.task]
    task = tasks.get(args.task).take(train=args.steps * batch)
    runs = {}
    for rule in RULES:
        with tempfile.TemporaryDirectory() as scratch:
            runs[rule] = run(rule, args, task, max_length, batch, Path(scratch))
    by_seed = {rule: {args.task: {args.seed: one}} for rule, one in runs.items()}
    difference = paired(by_seed["stock"], by_seed["learned"])
    rows = [
        {
            "rule": rule,
            "removed_%": round(100 * one["sparsity"], 2),
            "accuracy_%": round(100 * one["accuracy"], 2),
            "minus_learned": "{:+.2f} [{:+.2f}, {:+.2f}]".format(*difference) if rule == "stock" else None,
            "score_kept": round(runs["stock"]["kept_score"][rule], 3),
            "MB": round(one["bytes"] / 1e6, 1),
            **{f"{kind}_kept": f"{kept}/{of}" for kind, (kept, of) in one["by_kind"].items()},
        }
        for rule, one in runs.items()
    ]
    report.table(f"{task.name}, {args.model}: loadable by transformers alone, against ragged", rows)
    report.write(args.out, task=args.task, model=args.model, minus_learned=difference, runs=list(runs.values()))


if __name__ == "__main__":
    main()
