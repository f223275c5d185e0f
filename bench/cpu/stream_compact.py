"""How long, and in how much memory, does a model become compact that is never in memory?

    python -m bench.cpu.stream_compact              # LLaMA-7B's shape in bf16, 20 % removed, one thread; 25 GB of disk
    python -m bench.cpu.stream_compact --layers 1 --out /tmp/stream_compact

Random weights, written shard by shard, and an adapter as after training: random B, magnitudes and logits with a mean of
its own in every layer. `compact_files` runs in a process of its own: VmHWM counts pages mapped from files, which the
system can take back at any time; "anonymous" is what it cannot, sampled every 2 ms. Both are above what the process
had after its imports. Afterwards rows of three linears in the first and last layer are compared with the definition in
float64. "allowed" is two decoder layers and one shard as stored.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prunekern as pk
from bench.common import progress, report
from prunekern.compacting.plan import from_kept
from prunekern.pruning.adapter import ADAPTER_FORMAT, adapter_tensors
from prunekern.pruning.compact_files import compact_files
from prunekern.storage.shards import INDEX, Shards, write_shard

DTYPE, MB, GB = torch.bfloat16, 1e6, 1e9
ROWS = 1024  # of random numbers made at once
# bf16 has 8 bits: one rounding is at most 2^-9 of a weight; the sum of two terms of rank 8 in fp32 adds nothing to it.
TOLERANCE = 2**-8


def skeleton(config: LlamaConfig) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE)


def write_base(folder: Path, config: LlamaConfig, shard_size: str) -> None:
    """A checkpoint in transformers' layout; one piece of one tensor is in memory at a time."""
    folder.mkdir()
    tensors = skeleton(config).state_dict()
    generator = torch.Generator().manual_seed(0)

    def parts(name: str):
        shape = tensors[name].shape
        for start in range(0, shape[0], ROWS):
            rows = min(ROWS, shape[0] - start)
            noise = torch.randn(rows, *shape[1:], generator=generator)
            yield ((1 + 0.1 * noise) if "norm" in name else 0.02 * noise).to(DTYPE)

    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in progress.track(list(split.filename_to_tensors.items()), "writing the base"):
        write_shard(folder / file, {n: tensors[n] for n in names}, parts)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index))
    config.architectures, config.dtype = ["LlamaForCausalLM"], DTYPE
    config.save_pretrained(folder)


def write_adapter(folder: Path, config: LlamaConfig, share: float, rank: int) -> pk.Plan:
    """What `save_adapter` writes, of a model that never was; returns its plan."""
    folder.mkdir()
    model = skeleton(config)
    pruner = pk.attach(model, pk.PruneConfig(rank=rank, sparsity=share))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, meta in adapter_tensors(model).items():
        noise = torch.randn(meta.shape, generator=generator)
        if name.endswith(".magnitude"):
            noise = (0.02 * pruner.layers[name.removesuffix(".magnitude")].in_features ** 0.5) * (1 + 0.1 * noise)
        elif name.endswith(".logits"):
            noise = noise + torch.randn((), generator=generator)
        elif not name.endswith((".A", ".B")):  # threshold, saliency, final
            noise = torch.zeros_like(noise)
        else:
            noise = noise * (0.02 if name.endswith(".A") else 0.05)
        tensors[name] = noise.to(meta.dtype)
    logits = {carrier: tensors[f"{carrier}.mask.logits"] for carrier in pruner.masks}
    low, high = -10.0, 10.0
    for _ in range(24):
        middle = (low + high) / 2
        plan = from_kept(pruner.table, {c: v > middle for c, v in logits.items()})
        low, high = (middle, high) if plan.sparsity() < share else (low, middle)
    for carrier in logits:
        tensors[f"{carrier}.mask.threshold"].fill_(high)
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
    description = {
        "format": ADAPTER_FORMAT,
        "prune_config": pruner.config.to_dict(),
        "pruner": pruner.state_dict(),
        "base_model": None,
        "architecture": type(model).__name__,
        "model_config": model.config.to_diff_dict(),
    }
    (folder / "adapter_config.json").write_text(json.dumps(description))
    return from_kept(pruner.table, {c: v > high for c, v in logits.items()})


def status() -> dict[str, int]:
    """VmHWM and RssAnon in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
    return {name.rstrip(":"): 1024 * int(kilobytes) for name, kilobytes, _ in fields}


def measured(folder: Path, shard_size: str, threads: int) -> dict[str, float]:
    """Seconds of `compact_files`, and peaks above what this process has now."""
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, anonymous, done = status(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(2e-3):
            anonymous[0] = max(anonymous[0], status()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        compact_files(folder / "base", folder / "adapter", folder / "out", max_shard_size=shard_size)
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return {
        "seconds": seconds,
        "peak": status()["VmHWM"] - before["VmRSS"],
        "anonymous_peak": anonymous[0] - before["RssAnon"],
        "process_before": before["VmRSS"],
    }


def check(folder: Path, plan: pk.Plan, scale: float) -> None:
    """Kept rows and columns against m (V + s B A) / ||V + s B A|| in float64. SystemExit for a wrong answer."""
    base, out = Shards.of_model(folder / "base"), Shards.of_model(folder / "out")
    adapter = Shards.of_file(folder / "adapter" / "adapter.safetensors")
    every = list(plan.layers)
    for name in {*(every[i] for i in (0, 3, 6)), *(every[-i] for i in (1, 4, 7))}:
        rows, cols = plan.layers[name].rows[:16], plan.layers[name].cols
        V = base.read(f"{name}.weight")[rows].double()
        A, B, m = (adapter.read(f"{name}.{part}").double() for part in ("A", "B", "magnitude"))
        W = V + scale * B[rows] @ A
        W = (m[rows, None] * W / W.norm(dim=1, keepdim=True))[:, cols]
        got = out.read(f"{name}.weight")
        if got.shape[1] != len(cols) or (got[:16].double() - W).abs().max() > TOLERANCE * W.abs().max():
            raise SystemExit(f"{name}: wrong answer")


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--share", type=float, default=0.2, help="of the block parameters, removed")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where there is room for twice the model; default: the system's")
    parser.add_argument("--out", default="stream_compact")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=args.vocab,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        plan = write_adapter(folder / "adapter", config, args.share, args.rank)
        write_base(folder / "base", config, args.shard_size)
        progress.say("compact_files runs")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measured, folder, args.shard_size, args.threads).result()
        check(folder, plan, pk.PruneConfig(rank=args.rank).alpha / args.rank)
        bytes_in, bytes_out = size(folder / "base"), size(folder / "out")
        shard = max(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    layer = DTYPE.itemsize * plan.dense_params() // args.layers
    allowed = 2 * layer + shard
    row = {
        "removed_%": round(100 * plan.sparsity(), 2),
        "in_GB": round(bytes_in / GB, 2),
        "out_GB": round(bytes_out / GB, 2),
        "seconds": round(found["seconds"], 1),
        "GB_in_per_s": round(bytes_in / GB / found["seconds"], 2),
        "peak_MB": round(found["peak"] / MB),
        "anonymous_MB": round(found["anonymous_peak"] / MB),
        "allowed_MB": round(allowed / MB),
        "peak_of_allowed": round(found["peak"] / allowed, 2),
        "x_smaller_than_model": round(bytes_in / found["peak"], 1),
    }
    title = f"hidden {args.hidden}, {args.layers} layers, FFN {args.ffn}, vocabulary {args.vocab}, bf16"
    report.table(title, [row])
    report.write(
        args.out,
        title=title,
        rows=[row],
        threads=args.threads,
        rank=args.rank,
        shard_bytes=shard,
        layer_bytes=layer,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        **found,
    )


if __name__ == "__main__":
    main()
