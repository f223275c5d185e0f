"""Timing on a GPU: events around calls on inputs that take turns, so that nobody finds theirs in the L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch._library.triton import set_wrap_triton_enabled

from prunekern.machine.measure import interleaved


def sets_for(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs together are three times the L2 cache, at least 2 and at most 16."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(16, max(2, -(-3 * l2 // max(1, bytes_of_one))))


def median_seconds(
    calls: dict[str, Sequence[Callable[[], object]]],
    device: torch.device,
    seconds: float = 0.4,
    graphed: bool = True,
    check: Callable[[str, object], None] | None = None,
) -> dict[str, float]:
    """Median time of a call of each name, in turn with the others. calls: name -> the same call on sets of inputs.

    On a GPU one pass over the sets is recorded as a CUDA graph and replayed; graphed=False where that cannot be
    (backward passes). Either way the GPU is kept busy until all is submitted, so that kernels are timed and not
    launches. check(name, what the call on the first set gave) is called before anything is timed, on what is timed.
    """
    rounds = {name: _Round(some, device, graphed) for name, some in calls.items()}
    for name, one in rounds.items():
        one.run()
        if check is not None:
            check(name, one.first)

    def timed(one: Callable[[], object]) -> float:
        return _time(one, device) / one.count

    return interleaved(rounds, seconds, 5, each=True, timed=timed, of=lambda some: sorted(some)[len(some) // 2])


class _Round:
    """Calling it, or `run`, runs the call on every set, warmed up. first: what that on the first set gave. count: of
    the sets. cycles: of the GPU's clock in which all is submitted for certain.
    """

    def __init__(self, some: Sequence[Callable[[], object]], device: torch.device, graphed: bool):
        self.some, self.count, self.cycles = some, len(some), 200_000
        self.run, self.first = self.every, None
        if device.type != "cuda":
            self.every()
            return
        # Kernels are launched as the op's own implementation does: PyTorch's tracing wrapper costs a millisecond.
        with set_wrap_triton_enabled(False):
            if graphed:
                self.run = self._recorded(device)
                return
            for _ in range(3):
                torch.cuda.synchronize(device)
                start = time.perf_counter()
                self.every()
                self.cycles = round(2 * (time.perf_counter() - start) * 2e9)

    def __call__(self) -> None:
        self.run()

    def every(self) -> None:
        self.first = self.some[0]()
        for call in self.some[1:]:
            call()

    def _recorded(self, device: torch.device) -> Callable[[], None]:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.every()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.every()
        return graph.replay


def _time(one: _Round, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        one.run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(one.cycles)
    begin.record()
    with set_wrap_triton_enabled(False):
        one.run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the peak of a call over what was allocated before it; 0 without a GPU."""
    call()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(device: torch.device, size: int = 2**30, side: int = 8192) -> dict[str, float]:
    """Bytes a second of a device-to-device copy (read + written), operations a second of a bf16 product."""
    a = torch.randn(size // 4, device=device)
    b = torch.empty_like(a)
    x, y = (torch.randn(side, side, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
            for _ in range(2))  # fmt: skip
    found = median_seconds({"copy": [lambda: b.copy_(a)], "product": [lambda: x @ y]}, device)
    return {"copy_bytes": 2 * size / found["copy"], "product_flops": 2 * side**3 / found["product"]}
