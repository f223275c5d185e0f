"""Does a compact language model generate faster than the dense one, the same channels cut out plainly, llama.cpp?

    make llama-venv                                     # builds llama.cpp once, 8 minutes on two cores
    python -m bench.cpu.decode                          # SmolLM2-135M's shape, 20 % removed, one thread; ~6 minutes
    python -m bench.cpu.decode --share 0.5 --tokens 512
    python -m bench.cpu.decode --quick                  # a tiny model: does it run, are the answers right

Random weights of the real shape (they do not matter for speed), a ragged plan. One prompt, then so many tokens with a
DynamicCache, one at a time. Answers first: the logits of prompt and decoded tokens of everyone are compared with
float64 eager, removed rows zeroed where the model is pruned; where weights are rounded, by decibels. Then all take
turns in one process; the minimum over rounds of the time a token takes is compared. llama.cpp decodes the dense model
with the same ids, weights as F32, BF16, Q8_0 and Q4_0, in a child process that sleeps while others have their turn.
"bytes" are those of weights and cache that one token reads; "x llama" are llama.cpp's times over ours, of the nearest
kind of weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import prunekern as pk
from bench.common import llama, progress, report
from bench.common.answers import decibel
from bench.common.shapes import SMOLLM2, ragged
from bench.common.sliced import masked
from bench.common.sliced_decoder import sliced
from prunekern.compacting.checkpoint import WEIGHTS
from prunekern.machine.measure import interleaved, threads

TOLERANCE = 5e-5  # of fp32 logits, of the largest
# Of logits whose weights are rounded, after 30 layers of random weights. llama.cpp had 56, 39, 30 and 8 dB (its F32
# has a 16-bit cache); logits of something else have none.
LEAST = {"fp32": 40.0, "bf16": 25.0, "int8": 20.0, "int4": 4.0}
TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512}


@torch.inference_mode()
def decode(model: nn.Module, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, float, list[float]]:
    """(logits of the last prompt token and all after it, seconds of the prompt, of each token) with given ids."""
    cache, logits, seconds = DynamicCache(config=model.config), [], []
    for first in range(prompt - 1, ids.shape[1]):
        part = ids[:, :prompt] if first < prompt else ids[:, first : first + 1]
        start = time.perf_counter()
        out = model(part, past_key_values=cache, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
        logits.append(out.logits)
    return torch.cat(logits, 1), seconds[0], seconds[1:]


def bytes_read(model: nn.Module, keys: int) -> int:
    """Weights of all linears (the head's too), and the cache at `keys` tokens."""
    weights = 0
    for module in model.modules():
        if isinstance(module, (nn.Linear, pk.nn.CompactLinear)):
            weights += module.weight.numel() * module.weight.element_size()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
    return weights + keys * sum(t.numel() * t.element_size() for c in cache.layers for t in (c.keys, c.values))


def subjects(config: dict, share: float) -> tuple[dict[str, nn.Module], dict[str, nn.Module], pk.Plan]:
    """(models by name, float64 models that they are held to, the plan)."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM._from_config(LlamaConfig(**config), attn_implementation="sdpa").eval()
    dense.requires_grad_(False)
    small, plan = ragged(dense, share)
    models = {"dense": dense, "sliced": sliced(dense, plan)}
    with tempfile.TemporaryDirectory() as folder:
        pk.save(small, Path(folder) / "compact")
        for kind in WEIGHTS:
            models[f"compact {kind}"] = pk.load(Path(folder) / "compact", weights=kind, activations="auto")
    return models, {"dense": copy.deepcopy(dense).double(), "pruned": masked(dense, plan)}, plan


def check(models: dict, peer: llama.Llama | None, exact: dict, ids: torch.Tensor, prompt: int) -> dict[str, float]:
    """Decibels of the logits of those whose weights are rounded. SystemExit for a wrong answer."""
    want, noise = {}, {}
    with torch.inference_mode():
        for name, model in exact.items():
            want[name] = model(ids, use_cache=False).logits[:, prompt - 1 :]
    for name, model in models.items():
        right, kind = want["dense" if name == "dense" else "pruned"], name.split()[-1]
        got = decode(model, ids, prompt)[0].double()
        if name.startswith("compact") and kind != "fp32":
            noise[name] = decibel(got, right)
            good = noise[name] >= LEAST[kind]
        else:
            good = (got - right).abs().max() <= TOLERANCE * right.abs().max()
        if not good:
            raise SystemExit(f"{name}: wrong answer")
    for kind, theirs in llama.KINDS.items() if peer else ():
        name = f"llama.cpp {theirs}"
        noise[name] = decibel(peer.logits(theirs, ids, prompt), want["dense"])
        if not noise[name] >= LEAST[kind]:
            raise SystemExit(f"{name}: wrong answer ({noise[name]:.1f} dB)")
    return noise


def rows_of(prompts: dict, best: dict, size: dict, noise: dict) -> list[dict]:
    """One row for each contestant. prompts, best: seconds of the prompt and of a token; size: bytes a token reads."""
    rows = []
    for name in best:
        row = {
            "model": name,
            "prompt_ms": round(1e3 * prompts[name], 1),
            "token_ms": round(1e3 * best[name], 2),
            "tokens_per_s": round(1 / best[name], 1),
            "MB_a_token": round(size[name] / 1e6, 1),
            "GB_per_s": round(size[name] / best[name] / 1e9, 1),
            "x_dense": round(best["dense"] / best[name], 3),
            "bytes_x_dense": round(size["dense"] / size[name], 3),
            "x_sliced": round(best["sliced"] / best[name], 3),
            "x_compact_fp32": round(best["compact fp32"] / best[name], 3),
        }
        theirs = f"llama.cpp {llama.KINDS.get(name.split()[-1])}"
        compared = name.startswith("compact") and theirs in best
        row["x_llama"] = round(best[theirs] / best[name], 3) if compared else None
        row["prompt_x_llama"] = round(prompts[theirs] / prompts[name], 3) if compared else None
        rows.append(row | {"dB": round(noise[name], 1) if name in noise else None})
    return rows


def main() -> None:
    args = parse()
    config = SMOLLM2 | (TINY if args.quick else {})
    with threads(args.threads), contextlib.ExitStack() as stack:
        models, exact, plan = subjects(config, args.share)
        ids = torch.randint(
            5, config["vocab_size"], (1, args.prompt + args.tokens), generator=torch.Generator().manual_seed(1)
        )
        peer, missing = None, llama.why_not()
        if missing is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            kinds = tuple(llama.KINDS)
            peer = stack.enter_context(llama.Llama(models["dense"], folder, args.threads, ids.shape[1], kinds))
        else:
            progress.say(missing)
        noise = check(models, peer, exact, ids[:, : args.prompt + 8], args.prompt)
        del exact
        theirs = {f"llama.cpp {kind}": kind for kind in llama.KINDS.values()} if peer else {}
        prompts = dict.fromkeys([*models, *theirs], math.inf)

        def token_seconds(name: str) -> float:
            if name in theirs:
                prompt, each = peer.decode(theirs[name], ids, args.prompt)
            else:
                _, prompt, each = decode(models[name], ids, args.prompt)
            prompts[name] = min(prompts[name], prompt)
            return sum(each) / len(each)

        calls = {name: partial(token_seconds, name) for name in prompts}
        with progress.bar("rounds") as tell:
            best = interleaved(calls, 0.0, args.rounds, timed=lambda call: call(), progress=tell)
    keys = args.prompt + args.tokens // 2
    size = {name: bytes_read(model, keys) for name, model in models.items()}
    for name, kind in theirs.items():
        size[name] = peer.bytes[kind] + llama.cache_bytes(models["dense"].config, keys)
    rows = rows_of(prompts, best, size, noise)
    shape = "a tiny shape" if args.quick else "SmolLM2-135M's shape"
    title = f"{shape}, {100 * plan.sparsity():.0f} % removed, {args.prompt} + {args.tokens} tokens"
    report.table(title, rows)
    more = {"threads": args.threads, "rounds": args.rounds, "removed": plan.sparsity(), "missing": missing}
    report.write(args.out, title=title, rows=rows, **more)
    plot(rows, title, report.RESULTS / f"{args.out}.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2, help="of the block parameters, removed")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds: a test of the script")
    parser.add_argument("--out", default="decode")
    args = parser.parse_args()
    if args.quick:
        args.prompt, args.tokens, args.rounds = 16, 8, 2
    return args


def plot(rows: list[dict], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")
    names = [r["model"] for r in rows][::-1]
    bars = axis.barh(names, [r["tokens_per_s"] for r in rows][::-1], color="#0072B2")
    axis.bar_label(bars, [f"{r['tokens_per_s']:.0f} ({r['x_dense']:.2f} x dense)" for r in rows][::-1], padding=3)
    axis.margins(x=0.4)
    axis.set(xlabel="tokens a second, batch 1", title=title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
