"""Latency of models side by side: interleaved in one process, minima compared, answers first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from prunekern import _native


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's thread count for the block (the C++ kernels follow it)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float = 3.0, least: int = 8) -> dict[str, float]:
    """Fastest time of each call, in seconds: called in turn, at least `least` times and for about `seconds` in all."""
    for call in calls.values():
        call()  # allocation, packing and caches are not timed
    best = dict.fromkeys(calls, float("inf"))
    rounds, end = 0, time.perf_counter() + seconds
    while rounds < least or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def latency(
    models: Mapping[str, nn.Module], batch: int, tokens: int, seconds: float = 3.0, thread_count: int = 1
) -> dict[str, float]:
    """Fastest forward pass of each model, in seconds, on `batch` full sequences of `tokens` random ids.

    ValueError for more tokens than a model has positions for.
    """
    for name, model in models.items():
        most = getattr(model.config, "max_position_embeddings", tokens)
        most -= 2 * (model.config.model_type == "roberta")  # its positions begin after those of padding
        if tokens > most:
            raise ValueError(f"latency: tokens must be at most {most} for the {name} model (got {tokens})")
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.randint(5, vocabulary, (batch, tokens), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(model: nn.Module) -> Callable[[], object]:
        def call():
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return call

    with threads(thread_count), torch.inference_mode():
        return interleaved({name: forward(model) for name, model in models.items()}, seconds)


def dense_twin(compact: nn.Module) -> nn.Module:
    """The dense model of a compact one's config, weights random: for speed, where weights do not matter."""
    config = type(compact.config).from_dict(
        {k: v for k, v in compact.config.to_dict().items() if k != "quantization_config"}
    )
    config._attn_implementation = compact.config._attn_implementation
    return type(compact)(config).eval()


def peak_gflops(repeats: int = 200) -> float:
    """What the FMA units of one core do without touching memory, fp32, in GFLOP/s. RuntimeError without the core."""
    core = _native.core()
    best, flops = float("inf"), 0
    for _ in range(repeats):
        start = time.perf_counter()
        flops = core.run_peak(100_000)
        best = min(best, time.perf_counter() - start)
    return flops / best / 1e9


def run_peak(flops: int) -> None:
    """As many fp32 operations on one core, in registers only: the least time any kernel needs for them."""
    core = _native.core()
    core.run_peak(max(1, flops // core.run_peak(1)))


def read_bandwidth(size: int = 2**29, repeats: int = 5) -> float:
    """GB/s at which one core reads `size` bytes, larger than any cache. RuntimeError without the core."""
    core = _native.core()
    memory = torch.empty(size, dtype=torch.uint8)
    core.prefer_huge_pages(memory.data_ptr(), size)
    memory.fill_(1)  # pages that nobody wrote are all the same page
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        core.run_read(memory.data_ptr(), size)
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9
