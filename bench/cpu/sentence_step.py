"""What does a masked training step of a SentenceTransformer cost beside PEFT's LoRA, under the same trainer?

    python -m bench.cpu.sentence_step        # all-MiniLM-L6-v2, 16 pairs of 64 words, rank 8, every block linear

Both are trained by sentence-transformers' SentenceTransformerTrainer with MultipleNegativesRankingLoss and AdamW on the
same pairs, LoRA by `model.add_adapter`, ours by `PruneCallback`. They take turns in runs of a few steps in one process,
one thread; a step is from its begin to its end as the Trainer tells callbacks, and minima are compared.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import PrinterCallback, TrainerCallback

import prunekern as pk
from bench.common import progress, report
from prunekern.demo.models import demo_model

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
WORDS = "the market rose as shares of oil firms and banks fell while voters in the north waited for rain".split()


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self):
        self.steps: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.steps.append(time.perf_counter() - self.start)


def pairs(count: int, words: int) -> Dataset:
    made = [" ".join(WORDS[(i * 7 + k * (1 + i % 3)) % len(WORDS)] for k in range(words)) for i in range(2 * count)]
    return Dataset.from_dict({"anchor": made[:count], "positive": made[count:]})


def run(kind: str, base: SentenceTransformer, data: Dataset, args, folder: str) -> list[float]:
    """Seconds of the steps of one run but its first, whose memory is new."""
    model, clock = copy.deepcopy(base), Clock()
    options = SentenceTransformerTrainingArguments(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-5,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        dataloader_pin_memory=False, weight_decay=0.0,
    )  # fmt: skip
    more: dict = {"callbacks": [clock]}
    if kind == "PEFT LoRA":
        config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, lora_dropout=0.0)
        model.add_adapter(config)
    else:
        warm = 0.99 if kind == "masked, warm" else 0.0
        pruner = pk.attach(model, pk.PruneConfig(rank=args.rank, alpha=2 * args.rank, sparsity=0.25))
        more["callbacks"] = [clock, pk.PruneCallback(pruner, stage_one=1.0, warm=warm, ramp=0.01)]
        more["optimizers"] = (pk.optimizer(pruner, options), None)
    trainer = SentenceTransformerTrainer(
        model, options, train_dataset=data, loss=MultipleNegativesRankingLoss(model), **more
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # The last one of ours is the end of stage one: masks made final are no step.
    return clock.steps[1:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--out", default="sentence_step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = SentenceTransformer(str(demo_model("all-minilm-l6-v2")), device="cpu")
    data = pairs(args.batch * args.steps, args.words)
    kinds = ("PEFT LoRA", "masked", "masked, warm")
    best = dict.fromkeys(kinds, float("inf"))
    with progress.bar("turns") as tell, tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for kind in kinds:
                best[kind] = min(best[kind], *run(kind, base, data, args, folder))
            tell((turn + 1) / args.turns)
    rows = [
        {"method": kind, "step_ms": round(1e3 * s, 1), "ratio_to_lora": round(s / best["PEFT LoRA"], 3)}
        for kind, s in best.items()
    ]
    report.table(f"a step of all-MiniLM-L6-v2, {args.batch} pairs of {args.words} words, rank {args.rank}", rows)
    report.write(args.out, rows=rows, args=vars(args))


if __name__ == "__main__":
    main()
