"""How much does a training step of masked DoRA cost beside PEFT's LoRA and DoRA, and how little one of stage two?

    python -m bench.cpu.train_step            # DistilBERT-base shape, batch 8 x 64, rank 8, six linears, one thread
    python -m bench.cpu.train_step --bf16     # everyone under bf16 autocast

Answers first: the forward pass and gradients of the masked model (masks all on) must equal PEFT's DoRA; under autocast
its gradients must come as near to those of fp32 as PEFT's do. Then steps of forward, backward and Adam are interleaved
in one process; minima are compared.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import prunekern as pk
from bench.common import progress, report
from prunekern.machine.bf16_trap import BF16_REASON, bf16_matmul_crashes
from prunekern.machine.measure import interleaved

TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]


def build(rank: int) -> dict:
    """name -> (model, step after the optimiser's); all start from the same weights and the same A."""
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(
        DistilBertConfig(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
    ).train()
    built = {}
    for name, dora in (("PEFT LoRA", False), ("PEFT DoRA", True)):
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=TARGETS,
            use_dora=dora,
            modules_to_save=["pre_classifier", "classifier"],
        )
        built[name] = (get_peft_model(copy.deepcopy(base), config), lambda: None)
    for share in (0.25, 0.5):
        smaller = copy.deepcopy(base)
        second = pk.attach(smaller, pk.PruneConfig(rank=rank, alpha=2 * rank, sparsity=share))
        second.finalize("uniform", "random")
        second.shrink()
        built[f"stage two, {share:.0%} removed"] = (smaller, second.step)
    plain = copy.deepcopy(base)
    unmasked = pk.attach(plain, pk.PruneConfig(rank=rank, alpha=2 * rank, sparsity=0.0))
    for layer in unmasked.layers.values():
        layer.mask = None
    built["DoRA, no masks"] = (plain, unmasked.step)
    warm = copy.deepcopy(base)
    gathering = pk.attach(warm, pk.PruneConfig(rank=rank, alpha=2 * rank, sparsity=0.25, warm_steps=10**6))
    built["masked DoRA, warm"] = (warm, gathering.step)
    pruner = pk.attach(base, pk.PruneConfig(rank=rank, alpha=2 * rank, sparsity=0.25, warm_steps=0, ramp_steps=0))
    built["masked DoRA, stage one"] = (base, pruner.step)
    peft_layers = dict(built["PEFT DoRA"][0].base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in pruner.layers.items():
            layer.A.copy_(peft_layers[name].lora_A.default.weight)
    return built


def pairs(built: dict) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """(ours, PEFT's) of every trained part of the DoRA layers."""
    modules = dict(built["PEFT DoRA"][0].base_model.model.named_modules())
    found = []
    for name, layer in built["masked DoRA, stage one"][0].named_modules():
        if isinstance(layer, pk.nn.MaskedDoRALinear):
            other = modules[name]
            found += [
                (layer.A, other.lora_A.default.weight),
                (layer.B, other.lora_B.default.weight),
                (layer.magnitude, other.lora_magnitude_vector.default.weight),
            ]
    return found


def check(built: dict, batch: dict) -> float:
    """Largest relative difference of logits and adapter gradients to PEFT's DoRA, masks all on."""
    ours, peft = built["masked DoRA, stage one"][0], built["PEFT DoRA"][0]
    for model in (ours, peft):
        model(**batch).loss.backward()
    worst = 0.0
    for a, b in pairs(built):
        if b.grad.abs().max() > 0:
            worst = max(worst, ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    with torch.no_grad():
        a, b = ours(**batch).logits, peft(**batch).logits
    worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    for model in (ours, peft):
        model.zero_grad()
    assert worst < 1e-3, f"masked DoRA differs from PEFT's DoRA: {worst}"
    return worst


def check_bf16(built: dict, batch: dict) -> dict[str, float]:
    """By method, how far the gradients of adapters under bf16 autocast are from those of fp32, in dB."""
    grads: dict[str, list[Tensor]] = {}
    for name in ("masked DoRA, stage one", "PEFT DoRA"):
        model, side = built[name][0], 0 if name.startswith("masked") else 1
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            grads.setdefault(name, []).append(torch.cat([pair[side].grad.flatten() for pair in pairs(built)]))
            model.zero_grad()
    found = {
        name: round(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()).item(), 1)
        for name, (exact, got) in grads.items()
    }
    ours, peft = found["masked DoRA, stage one"], found["PEFT DoRA"]
    assert ours > peft - 1, f"gradients under autocast: {ours} dB from fp32, PEFT's {peft} dB"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    parser.add_argument("--out", help="default: train_step, with --bf16 train_step_bf16")
    args = parser.parse_args()
    if args.bf16 and bf16_matmul_crashes():
        parser.error(f"--bf16: {BF16_REASON}")
    name = args.out or ("train_step_bf16" if args.bf16 else "train_step")
    torch.set_num_threads(1)
    built = build(args.rank)
    ids = torch.randint(5, 30000, (args.batch, args.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(args.batch) % 2}
    answers: dict = {"largest_difference_to_peft_dora": check(built, batch)}
    if args.bf16:
        answers["decibels_to_fp32_gradients"] = check_bf16(built, batch)
    optimisers = {
        n: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], 1e-5) for n, (m, _) in built.items()
    }

    def step(name: str) -> None:
        model, after = built[name]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(**batch).loss
        loss.backward()
        optimisers[name].step()
        after()
        optimisers[name].zero_grad()

    with progress.bar("steps") as tell:
        best = interleaved({name: partial(step, name) for name in built}, 0.0, args.repeats, progress=tell)
    rows = [
        {
            "method": n,
            "step_ms": round(1e3 * t, 1),
            "ratio_to_lora": round(t / best["PEFT LoRA"], 3),
            "ratio_to_DoRA_no_masks": round(t / best["DoRA, no masks"], 3),
            "ratio_to_stage_one": round(t / best["masked DoRA, stage one"], 3),
        }
        for n, t in best.items()
    ]
    title = f"training step, DistilBERT-base shape, {args.batch} x {args.tokens}, rank {args.rank}, one thread"
    title += ", bf16 autocast" if args.bf16 else ""
    report.table(title, rows)
    report.write(name, rows=rows, **answers, args=vars(args))


if __name__ == "__main__":
    main()
