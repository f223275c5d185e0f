"""What would bring a pruned language model nearer to the dense one? Changes to the recipe, one JSON a run.

    python -m bench.language.ablations --threads 1 --warm-folder /tmp/warm    # all that are not done yet
    python -m bench.language.ablations --only-report

The run of bench.language.compare in every other respect: SmolLM2-135M, a fifth of the block parameters removed, the
same tokens in the same order. The warm steps are taken once (ten minutes on a core), then each run goes on from their
checkpoint (20 minutes). Choices are made by the validation split's perplexity; the test split's is beside it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback, set_seed

import prunekern as pk
from bench.common import progress, report, training
from bench.language import tables
from bench.language.ablation_parts import least_squares, second_moments
from bench.language.compare import blocks
from prunekern import tasks
from prunekern.demo.models import demo_model
from prunekern.training.recipe import TrainOptions, evaluate, load_dense, training_arguments

RUNS = report.RESULTS / "language_ablations"
STEPS, BATCH, LENGTH, WARM, BOUNDARY = 195, 4, 256, 76, 127  # as the recipe divides 200,000 tokens
MOMENTS = 64  # training blocks
SEED = 0


@dataclass(frozen=True)
class Variant:
    """at_once: masks final one step after the warm steps. fitted: least squares at that boundary. rate: stage two
    begins with so much of the learning rate, and falls to zero; None: it goes on falling. rank: of the adapters, with
    the same scale.
    """

    at_once: bool = False
    fitted: bool = False
    rate: float | None = None
    rank: int = 8


VARIANTS = {
    "recipe": Variant(),
    "least squares": Variant(fitted=True),
    "at once, rate again": Variant(at_once=True, rate=1.0),
    "at once, least squares, rate again": Variant(at_once=True, fitted=True, rate=1.0),
    "at once, least squares, twice the rate": Variant(at_once=True, fitted=True, rate=2.0),
    "at once, least squares, rate again, rank 32": Variant(at_once=True, fitted=True, rate=1.0, rank=32),
}


class Trainer(pk.PruneTrainer):
    """PruneTrainer with a variant's changes at the boundary and after it."""

    def __init__(self, *args, variant: Variant, rows, collate, validate, **kwargs):
        super().__init__(*args, **kwargs)
        self.variant, self.rows, self.collate, self.validate = variant, rows, collate, validate
        self.at_boundary: dict[str, float] = {}

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.variant.rate is None:
            return scheduler
        boundary = self.stage_one_steps(num_training_steps)

        def again(usual):
            def rate(step: int) -> float:
                if step < boundary:
                    return usual(step)
                past = step - boundary
                return self.variant.rate * min(1.0, (past + 1) / 6) * (1 - past / (num_training_steps - boundary))

            return rate

        groups = zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True)
        scheduler.lr_lambdas = [usual if self.holds_logits(group) else again(usual) for group, usual in groups]
        return scheduler

    def cross_boundary(self) -> None:
        variant, pruner = self.variant, self.pruner
        moments = None
        if variant.fitted:
            order = np.random.default_rng(1).permutation(len(self.rows))[:MOMENTS]
            chosen = [self.rows[int(i)] for i in order]
            moments = second_moments(pruner, [self.collate(chosen[i : i + BATCH]) for i in range(0, MOMENTS, BATCH)])
        pruner.finalize()
        self.at_boundary["masked"] = self.validate()
        if variant.fitted:
            self.at_boundary["error_left"] = least_squares(pruner, moments)
            self.at_boundary["fitted"] = self.validate()
        super().cross_boundary()


class StopAt(TrainerCallback):
    """Ends a run early, with a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = control.should_save = True


def run(variant: Variant, folder: Path, only_warm: bool) -> dict:
    """One run, from the warm steps' checkpoint in `folder` where there is one; only_warm: up to there."""
    wikipedia = tasks.get("wikipedia")
    dense, tokenizer = load_dense(str(demo_model("smollm2-135m")), wikipedia, SEED)
    disable_progress_bars()
    train, collate = blocks(tokenizer, STEPS * BATCH, LENGTH), wikipedia.collator(tokenizer)
    options = TrainOptions(
        max_steps=STEPS, batch_size=BATCH, learning_rate=1e-3, warmup_steps=10, max_length=LENGTH, seed=SEED
    )
    config = pk.PruneConfig(sparsity=0.2, seed=SEED, rank=variant.rank, alpha=2.0 * variant.rank)
    pruner = pk.attach(dense, config)

    def perplexity(split: str) -> float:
        progress.say(f"  scoring: {split} split")
        was_training = pruner.model.training
        metrics, _ = evaluate(pruner.model, tokenizer, wikipedia, LENGTH, split)
        pruner.model.train(was_training)
        return metrics["perplexity"]

    boundary = WARM + 1 if variant.at_once and not only_warm else BOUNDARY
    set_seed(SEED)
    trainer = Trainer(
        args=training_arguments(options, folder, save_strategy="no"),
        pruner=pruner,
        train_dataset=train,
        data_collator=collate,
        stage_one=boundary / STEPS,
        warm=WARM / boundary,
        variant=variant,
        rows=train,
        collate=collate,
        validate=lambda: perplexity("validation"),
    )
    if only_warm:
        trainer.add_callback(StopAt(WARM))
    checkpoint = folder / f"checkpoint-{WARM}"
    resumed = str(checkpoint) if checkpoint.is_dir() else None
    training.train(trainer, "warm steps" if only_warm else "steps", resume_from_checkpoint=resumed)
    if only_warm:
        return {}
    return {
        "seed": SEED,
        **asdict(variant),
        "removed": pruner.sparsity(),
        "at_boundary": trainer.at_boundary,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "validation": perplexity("validation"),
        "test": perplexity("test"),
    }


def summarise() -> None:
    dense = report.read_file(tables.path_of(tables.RUNS, "dense", 0.0, SEED))["perplexity"]
    rows = []
    for name in VARIANTS:
        path = RUNS / f"{file_name(name)}.json"
        if not path.exists():
            continue
        made = report.read_file(path)
        boundary = made["at_boundary"]
        rows.append(
            {
                "variant": name,
                "after_masks": boundary.get("masked"),
                "after_fit": boundary.get("fitted"),
                "validation": made["validation"],
                "test": made["test"],
                "x_dense": made["test"] / dense,
            }
        )
    numbers = {
        "validation: masks final": "after_masks",
        "and fitted": "after_fit",
        "validation: end": "validation",
        "test: end": "test",
    }
    shown = [
        {
            "variant": row["variant"],
            **{title: None if row[key] is None else f"{row[key]:.2f}" for title, key in numbers.items()},
            "x dense": f"{row['x_dense']:.3f}",
        }
        for row in rows
    ]
    report.table(f"A fifth removed: perplexity (test: dense {dense:.2f})", shown)
    report.write("language_ablations", dense_test=dense, rows=rows)


def file_name(variant: str) -> str:
    return variant.replace(", ", "+").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="these only")
    parser.add_argument("--warm-folder", type=Path, help="where the warm steps of rank 8 are kept for the next run")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only-report", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name, variant in VARIANTS.items():
        path = RUNS / f"{file_name(name)}.json"
        if args.only_report or path.exists() or (args.variant and name not in args.variant):
            continue
        progress.say(f"{name} runs")
        with tempfile.TemporaryDirectory() as scratch:
            shared = args.warm_folder if variant.rank == Variant().rank else None
            folder = Path(scratch) if shared is None else shared
            if shared is not None and not (shared / f"checkpoint-{WARM}").is_dir():
                run(Variant(), shared, only_warm=True)
            result = run(variant, folder, only_warm=False)
        report.write_file(path, result, indent=None)
        told = f"validation {result['validation']:.2f}, test {result['test']:.2f}"
        progress.say(f"{name}: {told}")
    summarise()


if __name__ == "__main__":
    main()
