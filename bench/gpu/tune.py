"""Which block sizes are fastest on this GPU? Every kernel of the promises over a grid, beside what configs.json ships.

    python -m bench.gpu.tune                          # all subjects, about 8 minutes on a machine with 16 cores
    python -m bench.gpu.tune --only gain-16,linear-8192
    python -m bench.gpu.tune --device cpu             # a rehearsal without a GPU, small, through the references

Processes of their own compile all candidates first (Triton keeps what they made on disk); then each is checked against
float64 and timed, alone, on inputs that take turns. bench/results/gpu-tune-NAME.json holds every candidate's time; what
wins by more than the spread of the shipped entry's own two timings belongs into prunekern/kernels/configs.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.common import report
from bench.gpu.timing import median_seconds
from bench.gpu.tune_subjects import Subject, subjects
from prunekern import kernels
from prunekern.kernels.launch import configs, device_of, pick

MODULE = "bench.gpu.tune"
LIMIT = 540  # seconds in all


def relative(got, want) -> float:
    """||got - want|| / ||want||; of several answers the largest, NaN before all."""
    if isinstance(want, tuple):
        errors = [relative(a, b) for a, b in zip(got, want, strict=False)]
        return max(errors, key=lambda e: (e != e, e))
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def use(subject: Subject, architecture: str, bits: str, entry: dict[str, int]) -> None:
    """From now on the kernel takes this entry, whatever the size."""
    configs()[architecture][subject.kernel][bits] = [entry]


def tune(subject: Subject, device: torch.device, dtype: torch.dtype, end: float, most: int) -> list[dict]:
    """Every candidate that runs and is right, fastest first; the shipped entry twice, as "shipped"."""
    calls, want = subject.make(device, dtype)
    architecture, bits = device_of(torch.empty(0, device=device))[0], str(8 * dtype.itemsize)
    kept = configs()[architecture][subject.kernel][bits]
    shipped = pick(subject.kernel, architecture, dtype, subject.size)
    tried = [("shipped", shipped), *(("", entry) for entry in subject.candidates()[:most]), ("shipped", shipped)]
    rows = []
    for what, entry in tried:
        if time.perf_counter() > end and not what:
            continue
        use(subject, architecture, bits, entry)
        try:
            error = relative(calls[0](), want)
            seconds = median_seconds({"it": calls}, device, 0.06)["it"] if error <= subject.bound else float("nan")
        except Exception as problem:  # out of shared memory, registers, or what Triton does not compile
            rows.append({"entry": entry, "what": what, "problem": f"{type(problem).__name__}: {problem}"[:200]})
            continue
        rows.append({"entry": entry, "what": what, "us": round(1e6 * seconds, 2), "error": error})
    configs()[architecture][subject.kernel][bits] = kept
    right = [r for r in rows if "us" in r and r["error"] <= subject.bound]
    return sorted(right, key=lambda r: r["us"]) + [r for r in rows if r not in right]


def warm(names: list[str], device: torch.device, dtype: torch.dtype, part: int, parts: int, small: bool) -> None:
    """Compile this process's share of the candidates by running them once."""
    for name in names:
        subject = subjects(small)[name]
        calls, _ = subject.make(device, dtype)
        architecture = device_of(torch.empty(0, device=device))[0]
        for entry in subject.candidates()[part::parts]:
            use(subject, architecture, str(8 * dtype.itemsize), entry)
            try:
                calls[0]()
            except Exception:  # `tune` meets it again, and says so
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", help="subjects, with commas between")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile")
    parser.add_argument("--out", default=str(report.RESULTS))
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    small, start = args.device == "cpu", time.perf_counter()
    known = subjects(small)
    names = args.only.split(",") if args.only else list(known)
    if not set(names) <= set(known):
        parser.error(f"--only: {args.only!r} must name some of {', '.join(known)}")
    if not small and (not torch.cuda.is_available() or kernels.problem()):
        parser.error(f"--device cuda: {kernels.problem() or 'there is no GPU that PyTorch sees'}")
    device, dtype = torch.device(args.device), torch.float32 if small else torch.bfloat16
    if args.warm:
        return warm(names, device, dtype, *map(int, args.warm.split("/")), small)
    found = {}
    for name in names:
        if time.perf_counter() > start + LIMIT:
            print(f"{name} and what follows: no time was left; --only names them")
            break
        if not small:
            command = [sys.executable, "-m", MODULE, "--only", name, "--warm"]
            shares = [f"{i}/{args.processes}" for i in range(args.processes)]
            wait([subprocess.Popen([*command, share], cwd=report.ROOT) for share in shares], start + LIMIT)
        rows = found[name] = tune(known[name], device, dtype, start + LIMIT, 2 if small else 10**6)
        best = [{"us": r["us"], "what": r["what"], **r["entry"]} for r in rows if "us" in r]
        columns = dict.fromkeys(key for row in best for key in row)
        shown = [{key: row.get(key) for key in columns} for row in best if row["what"] or row in best[:5]]
        report.table(f"{name}: {len(best)} of {len(rows)} run ({time.perf_counter() - start:.0f} s so far)", shown)
        if not small:
            write(Path(args.out), dtype, found)


def wait(processes: list[subprocess.Popen], end: float) -> None:
    """For all of them, not beyond `end`: what they have compiled by then is kept."""
    for process in processes:
        try:
            process.wait(max(0.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def write(out: Path, dtype: torch.dtype, found: dict[str, list[dict]]) -> None:
    """Subjects found now, beside those of earlier runs on this GPU."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")
    path = out / f"gpu-tune-{gpu}.json"
    facts = report.read_file(path) if path.exists() else {}
    facts |= {"command": f"python -m {MODULE}", "gpu": gpu, "torch": torch.__version__, "dtype": str(dtype)}
    report.write_file(path, {**facts, **found}, indent=1)
    print(f"wrote {path.name}", flush=True)


if __name__ == "__main__":
    main()
