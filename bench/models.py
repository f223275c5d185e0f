"""Is a compact model as much faster than its dense one as arithmetic was removed?

    python bench/models.py                     # DistilBERT-base and RoBERTa-base shapes, 25 % removed, one thread

Weights are random (they do not matter for speed); the plan is ragged: every mask loses its own number of channels,
chosen by random logits with a different mean in every layer. Answers first: compact must equal masked. Then dense
(eager, SDPA) and compact are interleaved in one process; minima are compared with the ideal, the ratio of the block
linears' multiply-adds.
"""

from __future__ import annotations

import argparse

import report
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import prunekern as pk
from prunekern.measure import latency

MODELS = {
    "DistilBERT-base": lambda: DistilBertForSequenceClassification(DistilBertConfig()),
    "RoBERTa-base": lambda: RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514)),
}


def ragged(dense: torch.nn.Module, share: float) -> tuple[torch.nn.Module, pk.Plan, float]:
    """(compact model, its plan, largest difference of logits to the masked model relative to the largest logit)."""
    pruner = pk.attach(dense, pk.PruneConfig(sparsity=share))
    generator = torch.Generator().manual_seed(0)
    for mask in pruner.masks.values():
        level = 0.3 * torch.randn((), generator=generator)
        mask.logits.data = level + torch.randn(mask.logits.shape, generator=generator)
    pruner.finalize()
    small = pk.compact(dense)
    ids = torch.randint(5, 30000, (2, 37), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.inference_mode():
        a, b = (m(input_ids=ids, attention_mask=mask).logits for m in (dense.eval(), small))
    difference = ((a - b).abs().max() / a.abs().max()).item()
    assert difference <= 1e-4, f"compact differs from masked: {difference}"
    return small, pruner.plan(), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--shapes", default="1x128,8x128", help="batch x tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long to measure each shape")
    parser.add_argument("--out", default="models")
    args = parser.parse_args()
    rows = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        attached, dense = make(), make().eval()
        small, plan, difference = ragged(attached, args.share)
        ideal = plan.dense_macs() / plan.macs()
        for shape in args.shapes.split(","):
            batch, tokens = (int(n) for n in shape.split("x"))
            t = latency({"dense": dense, "compact": small}, batch, tokens, args.seconds, args.threads)
            speedup = t["dense"] / t["compact"]
            rows.append(
                {
                    "model": name,
                    "batch_x_tokens": f"{batch} x {tokens}",
                    "removed_%": round(100 * plan.sparsity(), 2),
                    "dense_ms": round(1e3 * t["dense"], 2),
                    "compact_ms": round(1e3 * t["compact"], 2),
                    "speedup": round(speedup, 3),
                    "ideal": round(ideal, 3),
                    "of_ideal": round(speedup / ideal, 3),
                    "difference": f"{difference:.1e}",
                }
            )
    report.table(f"dense eager against compact, fp32, {args.threads} thread(s)", rows)
    report.write(args.out, rows=rows, args=vars(args))


if __name__ == "__main__":
    main()
