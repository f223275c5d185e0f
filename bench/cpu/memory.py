"""Peak memory of training a decoder with masked DoRA, beside PEFT's LoRA and DoRA, with and without checkpointing.

    python -m bench.cpu.memory                      # SmolLM2-135M's shape, 4 x 256 tokens, rank 8, all seven linears

Each figure is of a process of its own: the most it held (resident) over three steps of forward, backward and Adam, and
how much of that came on top of the loaded dense model. Ours is measured in its dearest phase, with masks drawn and
saliency gathered. Answers first, in this process: gradients of the adapters against PEFT's DoRA with all masks on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import prunekern as pk
from bench.common import progress, report
from bench.common.shapes import SMOLLM2

MODULE = "bench.cpu.memory"
METHODS = ("PEFT LoRA", "PEFT DoRA", "ours, warm", "ours, masks drawn")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-3  # of gradients, of the largest


def peak() -> float:
    """MB resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def built(method: str, layers: int, checkpointing: bool):
    """(model to train, what follows the optimiser's step)."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers})).train()
    dense.requires_grad_(False)
    if checkpointing:
        dense.gradient_checkpointing_enable({"use_reentrant": False})
    base = peak()
    if method.startswith("PEFT"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, use_dora=method == "PEFT DoRA")
        return get_peft_model(dense, config), lambda: None, base
    warm = 10**6 if "warm" in method else 0
    pruner = pk.attach(dense, pk.PruneConfig(rank=8, alpha=16, sparsity=0.2, warm_steps=warm, ramp_steps=0))
    return dense, pruner.step, base


def child(args) -> None:
    """Prints {"base": MB, "peak": MB}."""
    torch.set_num_threads(args.threads)
    model, after, base = built(args.child, args.layers, args.checkpointing)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(5, 49_000, (args.batch, args.tokens))
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad()
    print(json.dumps({"base": base, "peak": peak()}))


def check() -> float:
    """Largest relative difference of the adapters' gradients to PEFT's DoRA, checkpointed, masks all on, two blocks."""
    peft, _, _ = built("PEFT DoRA", 2, True)
    ours, _, _ = built("ours, warm", 2, True)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, pk.nn.MaskedDoRALinear)}
    others = dict(peft.base_model.model.named_modules())
    ids = torch.randint(5, 49_000, (2, 32))
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A.copy_(others[name].lora_A.default.weight)
            layer.B.normal_(0, 0.02)
            others[name].lora_B.default.weight.copy_(layer.B)
    for model in (ours, peft):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    worst = 0.0
    for name, layer in layers.items():
        other = others[name]
        pairs = (
            (layer.A, other.lora_A.default.weight),
            (layer.B, other.lora_B.default.weight),
            (layer.magnitude, other.lora_magnitude_vector.default.weight),
        )
        for a, b in pairs:
            worst = max(worst, ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    if not worst < TOLERANCE:
        raise SystemExit(f"gradients differ from PEFT's DoRA: {worst}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="memory")
    args = parser.parse_args()
    if args.child:
        return child(args)
    worst = check()
    sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "tokens", "layers", "threads")]
    rows = []
    for checkpointing in (True, False):
        lora = None
        for method in progress.track(METHODS, "measuring"):
            extra = ["--checkpointing"] if checkpointing else []
            command = [sys.executable, "-m", MODULE, "--child", method, *sizes, *extra]
            done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            lora = lora or found
            rows.append(
                {
                    "method": method,
                    "checkpointing": "yes" if checkpointing else "no",
                    "loaded_MB": round(found["base"]),
                    "peak_MB": round(found["peak"]),
                    "x_LoRA": round(found["peak"] / lora["peak"], 3),
                    "on_top_x_LoRA": round((found["peak"] - found["base"]) / (lora["peak"] - lora["base"]), 3),
                }
            )
    shape = f"SmolLM2-135M's shape, {args.batch} x {args.tokens} tokens"
    report.table(f"{shape}: peak resident memory of a training step", rows)
    report.write(args.out, title=shape, rows=rows, gradients_differ=worst)


if __name__ == "__main__":
    main()
