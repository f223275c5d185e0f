"""Everything that needs a GPU, in one command: tests, then every figure of the Triton kernels, then whole models.

    python bench/gpu.py                  # about 8 minutes; writes bench/results/gpu-NAME.json and .png
    python bench/gpu.py --skip-tests --only gain,training
    python bench/gpu.py --device cpu     # a rehearsal without a GPU, small, through the references; nothing is written

No network, no pip and no build (the GPU path needs no C++); runs on PyTorch 2.11 with Triton 3.6 and newer. Answers
come first: a part whose kernel is off by more than the rounding of its dtype gives no figures. The JSON is written
after every part. The tests come last, as most of their time is compilation.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the GPU's machine need not have the package installed

# ruff: noqa: E402
import gpu_layers as layers
import report
import torch
from gpu_timing import ceilings

from prunekern import kernels

PARTS = ("gain", "training", "passes", "routes", "compact", "models", "decoders")
LIMIT = 570  # seconds in all
# What is promised of an H200: table, figure, rows it is about, bound (at least; at most where negative).
PROMISES = (
    ("gain", "of_copy_bandwidth", lambda r: r["rank"] <= 64, 0.80),
    ("gain", "x_PEFT", lambda r: r["rank"] <= 64, 5.0),
    ("gain", "of_arithmetic_floor", lambda r: r["rank"] > 64, 0.50),
    ("training", "x_LoRA", lambda r: True, -1.10),
    ("training", "faster_than_DoRA", lambda r: True, 1.5),
    ("training", "memory_over_LoRA_outputs", lambda r: True, -1.05),
    ("passes", "compose_of_copy", lambda r: r["rank"] <= 64, 0.80),
    ("passes", "backward_of_copy", lambda r: r["rank"] <= 64, 0.80),
    ("compact", "scatter + residual, of vendor", lambda r: r["rows"] >= 1024, 0.90),
)


def run_tests(out: Path, limit: int) -> dict:
    """The GPU tests, in a process of their own; the log is kept beside the figures."""
    start, log = time.perf_counter(), out / "gpu-tests.log"
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_gpu.py", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as file:
        try:
            environment = {**os.environ, "PYTHONPATH": path}
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, env=environment, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = "time is up"
    text = log.read_text()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text)}
    print(text[-3000:])
    return {"counts": counts, "seconds": round(time.perf_counter() - start, 1), "green": code == 0, "exit": code}


def kept(found: dict) -> list[dict]:
    """Every promise with its worst figure."""
    rows = []
    for part, figure, about, bound in PROMISES:
        values = [r[figure] for r in found.get(part, []) if about(r)]
        if values:
            worst = max(values) if bound < 0 else min(values)
            held = worst <= -bound if bound < 0 else worst >= bound
            asked = f"{'at most' if bound < 0 else 'at least'} {abs(bound)}"
            rows.append({"table": part, "figure": figure, "worst": worst, "asked": asked, "held": held})
    return rows


def plot(found: dict, name: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, part, bars, title in (
        (
            axes[0],
            "training",
            {"LoRA_ms": "PEFT LoRA", "DoRA_ms": "PEFT DoRA", "ms": "prunekern"},
            "forward + backward, ms",
        ),
        (axes[1], "gain", {"PEFT_us": "PEFT", "us": "prunekern"}, "norm and gain, us"),
        (axes[2], "models", {"dense_ms": "dense", "compact_ms": "prunekern, compact"}, "whole models, ms"),
    ):
        rows = found.get(part, []) + (found.get("decoders", []) if part == "models" else [])
        for i, (key, label) in enumerate(bars.items()):
            at = [n + 0.27 * i for n in range(len(rows))]
            axis.bar(at, [r[key] for r in rows], 0.25, label=label)
        axis.set_xticks(range(len(rows)), [" ".join(str(v) for v in list(r.values())[:2]) for r in rows], rotation=60)
        axis.tick_params(axis="x", labelsize=7)
        axis.set(title=title)
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    figure.suptitle(name)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def small(device: torch.device) -> dict:
    """The parts at sizes a CPU gets through in seconds, in fp32: a rehearsal of the code, not of the figures."""
    shapes, ranks, fp32 = ((64, 48),), (4,), torch.float32
    return {
        "gain": functools.partial(layers.gain, device, 1e10, 1e11, shapes, ranks, fp32),
        "training": functools.partial(layers.training, device, shapes, ranks, 32, fp32),
        "compact": functools.partial(layers.compact, device, shapes, (1, 16), 0.25, fp32),
        "models": functools.partial(models, device, rehearsal=True),
        "decoders": functools.partial(decoders, device, rehearsal=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--out", default=str(report.RESULTS))
    args = parser.parse_args()
    only = args.only.split(",")
    if not set(only) <= set(PARTS):
        parser.error(f"--only: {args.only!r} must name some of {', '.join(PARTS)}")
    if args.device == "cuda" and (not torch.cuda.is_available() or kernels.problem()):
        parser.error(
            f"--device cuda: {kernels.problem() or 'there is no GPU that PyTorch sees'}; --device cpu rehearses"
        )
    device, start = torch.device(args.device), time.perf_counter()
    if args.device == "cpu":
        for name, part in small(device).items():
            if name in only:
                report.table(name, part())
        return
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    path = out / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"
    facts = {"command": "python bench/gpu.py", "gpu": gpu, "torch": torch.__version__, **ceilings(device)}
    facts |= {"triton": __import__("triton").__version__, "python": sys.version.split()[0], "errors": {}}
    copy_bytes, flops = facts["copy_bytes"], facts["product_flops"]
    print(f"{gpu}: copy {copy_bytes / 1e12:.2f} TB/s, bf16 product {flops / 1e12:.0f} TFLOP/s")
    parts = {
        "gain": lambda: layers.gain(device, copy_bytes, flops),
        "training": lambda: layers.training(device),
        "passes": lambda: layers.passes(device, copy_bytes),
        "routes": lambda: layers.routes(device),
        "compact": lambda: layers.compact(device),
        "models": lambda: models(device),
        "decoders": lambda: decoders(device),
    }
    found: dict = {}
    for name in (n for n in parts if n in only):
        try:
            found[name] = parts[name]()
            report.table(name, found[name])
        except (Exception, SystemExit) as error:  # one wrong answer must not take the other figures along
            facts["errors"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {facts['errors'][name]}")
        _write(path, facts, found, start)
    if not args.skip_tests:
        facts["tests"] = run_tests(out, max(60, round(LIMIT - (time.perf_counter() - start))))
    _write(path, facts, found, start)
    if kept(found):
        report.table("promises", kept(found))
    plot(found, gpu, path.with_suffix(".png"))
    print(f"wrote {path.name}")
    sys.exit(bool(facts["errors"]) or not facts.get("tests", {"green": True})["green"])


def _write(path: Path, facts: dict, found: dict, start: float) -> None:
    whole = {**facts, "seconds": round(time.perf_counter() - start), "promises": kept(found), **found}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    print(f"{whole['seconds']} s so far", flush=True)


def models(device, **options) -> list[dict]:
    from gpu_models import models as run  # transformers may be missing or another one

    return run(device, **options)


def decoders(device, **options) -> list[dict]:
    from gpu_models import decoders as run

    return run(device, **options)


if __name__ == "__main__":
    main()
