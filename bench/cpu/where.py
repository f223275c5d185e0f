"""Where does the time of a forward pass go, once products are of 8 and 16 bits?

    python -m bench.cpu.where                # DistilBERT-base's shape, 25 % removed, one thread; 1 minute

The compact model with its weights in each kind, in fp32 arithmetic (activations "float") and as "auto" runs them, under
torch.profiler, whose rows are summed into parts; the least of several passes by part. While a profiler looks on, layer
norms are PyTorch's: what they take otherwise is measured apart ("layer norm, ours").
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.common import progress, report, shapes
from prunekern.compacting.checkpoint import set_weights
from prunekern.machine.measure import threads
from prunekern.ops.layer_norm import layer_norm

KINDS = (("fp32", "auto"), ("bf16", "auto"), ("int8", "float"), ("int8", "auto"))
PARTS = {
    "prunekern::compact_mlp": "FFN products, gelu",
    "prunekern::compact_linear": "attention's products",
    "prunekern::compact_attention": "attention itself",
    "prunekern::disentangled_attention": "attention itself",
    "aten::native_layer_norm": "layer norm, PyTorch's",
}


def parts_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, passes: int) -> dict[str, float]:
    """Milliseconds by part, the least of `passes`; and "all"."""
    least: dict[str, float] = {}
    for _ in range(passes):
        start = time.perf_counter()
        model(ids, attention_mask=mask)
        took = {"all": 1e3 * (time.perf_counter() - start)}
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            model(ids, attention_mask=mask)
        for row in seen.key_averages():
            part = PARTS.get(row.key, "everything else")
            took[part] = took.get(part, 0.0) + row.self_cpu_time_total / 1e3
        least = {part: min(ms, least.get(part, ms)) for part, ms in took.items()}
    return least


def norms(rows: int, width: int, count: int) -> float:
    """Milliseconds of `count` layer norms of ours."""
    x, weight, bias, best = torch.randn(rows, width), torch.randn(width), torch.randn(width), float("inf")
    want = F.layer_norm(x, (width,), weight, bias, 1e-12)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-12), want, rtol=1e-4, atol=1e-4)
    for _ in range(50):
        start = time.perf_counter()
        layer_norm(x, weight, bias, 1e-12)
        best = min(best, time.perf_counter() - start)
    return 1e3 * best * count


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DistilBERT-base", choices=sorted(shapes.MODELS))
    parser.add_argument("--shapes", default="1x128,8x128", help="batch x tokens")
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--out", default="where")
    args = parser.parse_args()
    rows = []
    with threads(1):
        small, _ = shapes.ragged(shapes.dense_model(args.model), 0.25)
        small.eval().requires_grad_(False)
        models = {kind: set_weights(copy.deepcopy(small), *kind) for kind in KINDS}
        count = sum(isinstance(module, nn.LayerNorm) for module in small.modules())
        for text in args.shapes.split(","):
            batch, tokens = (int(n) for n in text.split("x"))
            ids, mask = shapes.inputs(batch, tokens)
            ours = norms(batch * tokens, small.config.hidden_size, count)
            for (weights, activations), model in models.items():
                progress.say(f"  {text}, {weights} weights, activations {activations}")
                ms = parts_of(model, ids, mask, args.passes)
                row = {"batch_x_tokens": text, "weights": weights, "activations": activations, "all_ms": ms["all"]}
                row |= {part.replace(" ", "_"): ms.get(part, 0.0) for part in (*PARTS.values(), "everything else")}
                row["layer_norm,_ours"] = ours
                rows.append({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})
    report.table(f"{args.model}, 25 % removed, one thread: milliseconds by part", rows)
    report.write(args.out, rows=rows, args=vars(args))


if __name__ == "__main__":
    main()
