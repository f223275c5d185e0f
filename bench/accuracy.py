"""What accuracy does removal cost, beside full fine-tuning, LoRA, DoRA and uniform pruning?

    python bench/accuracy.py                    # all runs that are not done yet, then table, JSON and plot
    python bench/accuracy.py --only-report      # from the runs that are there

Every run takes the same steps, batches, seeds and learning-rate schedule (full fine-tuning has a tenth of the
adapters' rate), and is scored on the same test sentences. One JSON a run in bench/results/accuracy/, so that an
interrupted sitting goes on where it stopped. Intervals are paired: the same sentences, resampled together.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import report
import torch
from rich.console import Console

METHODS = {  # name -> shares of the block parameters removed
    "full fine-tuning": (0.0,),
    "LoRA": (0.0,),
    "DoRA": (0.0,),
    "uniform, random": (0.25, 0.5),
    "uniform, magnitude": (0.25, 0.5),
    "ours": (0.25, 0.5),
}
TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
RUNS = report.RESULTS / "accuracy"


def train_peer(name: str, dense, encoded, task, tokenizer, options, out: Path):
    """Full fine-tuning, or PEFT's LoRA or DoRA on the same six linears, with PruneTrainer's schedule."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer

    from prunekern.recipe import training_arguments

    rate = options.learning_rate
    if name == "full fine-tuning":
        model, rate = dense, 0.1 * rate
    else:
        head = ["pre_classifier", "classifier"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, modules_to_save=head, use_dora=name == "DoRA")
        model = get_peft_model(dense, config)
    boundary = round(options.max_steps * options.stage_one)
    drop = options.final_learning_rate / options.learning_rate
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < boundary else drop)
    trainer = Trainer(
        model=model,
        args=training_arguments(options, out, save_strategy="no"),
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, 0.0


def train_ours(name: str, share: float, dense, encoded, task, tokenizer, options, out: Path, seed: int):
    """Learned masks; or masks made final before the first step, the same fraction everywhere."""
    from transformers import PrinterCallback

    import prunekern as pk
    from prunekern.recipe import training_arguments

    pruner = pk.attach(dense, pk.PruneConfig(sparsity=share, seed=seed))
    if name != "ours":
        pruner.finalize("uniform", name.split(", ")[1])
    trainer = pk.PruneTrainer(
        args=training_arguments(options, out, save_strategy="no"),
        pruner=pruner,
        stage_one=options.stage_one,
        warm=options.warm,
        ramp=options.ramp,
        final_learning_rate=options.final_learning_rate,
        mask_learning_rate=options.mask_learning_rate,
        train_dataset=encoded["train"],
        data_collator=task.collator(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return pruner.model, pruner.sparsity()


def run(name: str, share: float, seed: int, args, out: Path) -> dict:
    from transformers import set_seed

    from prunekern import tasks
    from prunekern.demo.models import demo_model
    from prunekern.recipe import TrainOptions, evaluate, load_dense

    options = TrainOptions(
        max_steps=args.steps,
        batch_size=args.batch,
        learning_rate=args.lr,
        final_learning_rate=0.2 * args.lr,
        mask_learning_rate=args.mask_lr,
        max_length=args.max_length,
        seed=seed,
    )
    task = tasks.get("reviews")
    dense, tokenizer = load_dense(str(demo_model(args.model)), task, seed)
    encoded = task.encode(tokenizer, options.max_length)
    set_seed(seed)
    start = time.perf_counter()
    common = (dense, encoded, task, tokenizer, options, out)
    model, removed = train_peer(name, *common) if share == 0 else train_ours(name, share, *common, seed)
    seconds = time.perf_counter() - start
    metrics, logits = evaluate(model, tokenizer, task, options.max_length)
    right = logits.argmax(1).numpy() == np.array(task.splits[task.score_split]["label"])
    return {
        "method": name,
        "share": share,
        "removed": removed,
        "seed": seed,
        "task": task.name,
        "accuracy": metrics["accuracy"],
        "right": np.packbits(right).tobytes().hex(),  # one bit a test sentence, for paired intervals
        "sentences": len(right),
        "train_seconds": round(seconds, 1),
        "options": options.__dict__,
        "model": args.model,
    }


def load_runs() -> dict[tuple[str, float], list[dict]]:
    runs: dict[tuple[str, float], list[dict]] = {}
    for path in sorted(RUNS.glob("*.json")):
        one = json.loads(path.read_text())
        runs.setdefault((one["method"], one["share"]), []).append(one)
    return runs


def right(runs: list[dict]) -> dict[int, np.ndarray]:
    """By seed: which test sentences were answered right."""
    return {
        r["seed"]: np.unpackbits(np.frombuffer(bytes.fromhex(r["right"]), np.uint8))[: r["sentences"]].astype(float)
        for r in runs
    }


def paired(a: list[dict], b: list[dict], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean difference a - b in points over shared seeds, with a 95 % bootstrap interval over test sentences."""
    a_right, b_right = right(a), right(b)
    seeds = sorted(set(a_right) & set(b_right))
    difference = 100 * np.mean([a_right[s] - b_right[s] for s in seeds], axis=0)  # by sentence
    rng = np.random.default_rng(0)
    counts = rng.multinomial(difference.size, np.full(difference.size, 1 / difference.size), size=draws)
    means = counts @ difference / difference.size
    return float(difference.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975)))


def summarise(out: str) -> None:
    runs = load_runs()
    rows = []
    for (name, share), group in sorted(runs.items(), key=lambda kv: (kv[0][1], list(METHODS).index(kv[0][0]))):
        row = {
            "method": name,
            "removed_%": f"{100 * np.mean([r['removed'] for r in group]):.2f}",
            "accuracy": f"{100 * np.mean([r['accuracy'] for r in group]):.2f}",
            "seeds": " ".join(f"{100 * r['accuracy']:.2f}" for r in sorted(group, key=lambda r: r["seed"])),
        }
        for label, other in (("vs_DoRA", ("DoRA", 0.0)), ("ours_minus_it", ("ours", share))):
            comparable = other in runs and other != (name, share) and (label == "vs_DoRA" or share > 0)
            first, second = (group, runs.get(other, [])) if label == "vs_DoRA" else (runs.get(other, []), group)
            if comparable:
                mean, low, high = paired(first, second)
                row[label] = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            else:
                row[label] = None
        rows.append(row)
    some = next(iter(runs.values()))[0]
    title = f"{some['task']}, {some['sentences']} test sentences, {some['model']}, {some['options']['max_steps']} steps"
    report.table(title, rows)
    report.write(out, title=title, rows=rows, options=some["options"])
    plot(runs, title, report.RESULTS / f"{out}.png")


def plot(runs: dict, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("#999999", "#56B4E9", "#000000", "#E69F00", "#009E73", "#0072B2"), strict=True))
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, shares in METHODS.items():
        points = [(100 * s, [100 * r["accuracy"] for r in runs[name, s]]) for s in shares if (name, s) in runs]
        if not points:
            continue
        at, values = [p[0] for p in points], [np.mean(p[1]) for p in points]
        low = [m - min(p[1]) for p, m in zip(points, values, strict=True)]
        high = [max(p[1]) - m for p, m in zip(points, values, strict=True)]
        axis.errorbar(at, values, yerr=(low, high), marker="o", capsize=3, label=name, color=colours[name])
        if shares == (0.0,):
            axis.axhline(values[0], color=colours[name], linewidth=0.6, linestyle=":")
    axis.set(xlabel="block parameters removed, %", ylabel="test accuracy, % (bars: seeds)", title=title)
    axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--mask-lr", type=float, default=5e-2)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--model", default="mini-distilbert")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--only-report", action="store_true")
    parser.add_argument("--out", default="accuracy")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console()
    RUNS.mkdir(parents=True, exist_ok=True)
    wanted = [(n, s, seed) for seed in range(args.seeds) for n, shares in METHODS.items() for s in shares]
    for i, (name, share, seed) in enumerate(wanted):
        path = RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{round(100 * share)}-{seed}.json"
        if path.exists() or args.only_report:
            continue
        with console.status(f"run {i + 1} of {len(wanted)}: {name}, {100 * share:.0f} % removed, seed {seed}"):
            with tempfile.TemporaryDirectory() as scratch:
                result = run(name, share, seed, args, Path(scratch))
        path.with_suffix(".part").write_text(json.dumps(result) + "\n")
        path.with_suffix(".part").replace(path)
        took = result["train_seconds"]
        console.print(
            f"{name} {100 * share:.0f} % seed {seed}: {100 * result['accuracy']:.2f} ({took} s)", highlight=False
        )
    summarise(args.out)


if __name__ == "__main__":
    main()
