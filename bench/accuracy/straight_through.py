"""Does it pay to train on with the rounding in the forward pass (straight through), before weights become int8 or int4?

    make demo                                        # runs/demo: a quarter removed
    python -m bench.accuracy.straight_through        # table and bench/results/straight_through.json; ~15 minutes

The demo's compact model learns for some more steps on its training sentences, all weights: once as it is, and once with
its block weights and what they read rounded in the forward pass as int8 and int4 round them, gradients passing as if
they were not (Bengio et al. 2013). Each is then held in that kind and asked the test sentences. Same steps, same
sentences, same rates, several seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import prunekern as pk
from bench.common import progress, report
from prunekern import tasks
from prunekern.compacting.checkpoint import set_weights
from prunekern.compacting.losing import rounded, rounded_rows
from prunekern.nn import CompactLinear
from prunekern.training.recipe import evaluate

KINDS = ("int8", "int4")


def straight(x: Tensor, near: Tensor) -> Tensor:
    """The value of `near`, the gradient of x."""
    return x + (near - x).detach()


class Rounds(nn.Module):
    """A weight [N, K] as a kind holds it."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            near = rounded(weight, self.kind)
        return straight(weight, near)


def rounds_rows(layer: nn.Module, args: tuple) -> tuple:
    with torch.no_grad():
        near = rounded_rows(args[0], "int8", "int8")
    return (straight(args[0], near), *args[1:])


def train(model: nn.Module, loader: DataLoader, steps: int, rate: float, kind: str | None, tell) -> None:
    """In place, with the rounding of `kind` in the forward pass, or without."""
    layers = [m for m in model.modules() if isinstance(m, CompactLinear)]
    model.requires_grad_(True).train()
    hooks = []
    for layer in layers if kind is not None else ():
        parametrize.register_parametrization(layer, "weight", Rounds(kind), unsafe=True)
        hooks.append(layer.register_forward_pre_hook(rounds_rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    step = 0
    while step < steps:
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tell(step / steps)
            if step == steps:
                break
    for hook in hooks:
        hook.remove()
    for layer in layers if kind is not None else ():
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    model.requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `prunekern demo`")
    parser.add_argument("--steps", type=int, default=120, help="of 32 sentences")
    parser.add_argument("--rate", type=float, default=2e-5)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--texts", type=int, help="of the test split; all of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="straight_through")
    args = parser.parse_args()
    folder = args.demo / "compact"
    if not (folder / "config.json").exists():
        parser.error(f"--demo: no compact model in {folder}; make demo makes one")
    torch.set_num_threads(args.threads)
    task, tokenizer = tasks.get("reviews"), AutoTokenizer.from_pretrained(folder)
    if args.texts:
        task = task.take(test=args.texts)
    data, collate = task.encode(tokenizer, 64)["train"], task.collator(tokenizer)

    def accuracy(model: nn.Module, kind: str) -> float:
        set_weights(model, kind)
        metrics, _ = evaluate(model, tokenizer, task, 64)
        return 100 * metrics["accuracy"]

    rows = []
    for kind in KINDS:
        before = accuracy(pk.load(folder), kind)
        row = {"weights": kind, "as it is": round(before, 2)}
        for how, rounding in (("trained on", None), ("trained on with the rounding", kind)):
            found = []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                order = torch.Generator().manual_seed(seed)
                loader = DataLoader(data, 32, shuffle=True, collate_fn=collate, generator=order)
                model = pk.load(folder)
                with progress.bar(f"{kind}, {how}, seed {seed}") as tell:
                    train(model, loader, args.steps, args.rate, rounding, tell)
                found.append(accuracy(model, kind))
            row[how] = ", ".join(f"{one:.2f}" for one in found)
        rows.append(row)
    report.table(f"accuracy in %, {args.steps} more steps, {args.seeds} seeds", rows)
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report.write(args.out, rows=rows, args=shown)


if __name__ == "__main__":
    main()
