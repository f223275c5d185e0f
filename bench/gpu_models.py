"""What bench/gpu.py times of whole models: dense on stock transformers against compact, at the paper's reductions."""

from __future__ import annotations

import torch
from gpu_timing import median_seconds
from models import dense_model, ragged
from sliced import masked

# Ali et al., ASP-DAC 2025: size removed and time saved, means over their tasks, %.
PAPER = {"DistilBERT-base": (0.1738, 13.1), "RoBERTa-base": (0.2463, 17.9)}
SHAPES = ((1, 128), (8, 128), (64, 128))


@torch.no_grad()
def models(device: torch.device, rehearsal: bool = False) -> list[dict]:
    """One row for each encoder (without its head) and shape, bf16. Weights are random: they do not matter for speed."""
    rows = []
    for name, (share, paper_saved) in PAPER.items():
        if rehearsal and name != "DistilBERT-base":
            continue
        dense = dense_model(name)
        # Multiples of 16: rows of 16-bit weights then begin where a GPU can read 16 bytes at once.
        small, plan = ragged(dense, share, align=16)
        dense, small, exact = (m.base_model for m in (dense, small, masked(dense, plan).to(device)))
        dtype = torch.float32 if rehearsal else torch.bfloat16
        dense, small = (m.to(device, dtype) for m in (dense, small))
        ideal = plan.dense_macs() / plan.macs()
        for batch, tokens in SHAPES[: 1 if rehearsal else None]:
            ids = torch.randint(5, 30000, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            want = exact(**inputs).last_hidden_state
            got, whole = small(**inputs).last_hidden_state, dense(**inputs).last_hidden_state
            error = ((got.double() - want).norm() / want.norm()).item()
            if not error <= (1e-4 if rehearsal else 3e-2) or whole.shape != got.shape:
                raise SystemExit(f"{name}: compact model is off by {error:.1e}")
            calls = {"dense": [lambda i=inputs, m=dense: m(**i)], "compact": [lambda i=inputs, m=small: m(**i)]}
            seconds = median_seconds(calls, device, 0.4)
            ratio = seconds["dense"] / seconds["compact"]
            rows.append(
                {
                    "model": name,
                    "batch x tokens": f"{batch} x {tokens}",
                    "removed_%": round(100 * plan.sparsity("params"), 2),
                    "dense_ms": round(1e3 * seconds["dense"], 3),
                    "compact_ms": round(1e3 * seconds["compact"], 3),
                    "faster": round(ratio, 3),
                    "of_ideal": round(ratio / ideal, 3),
                    "saved_%": round(100 * (1 - 1 / ratio), 1),
                    "paper_saved_%": paper_saved,
                }
            )
    return rows
