"""Everything that needs a GPU, in one command: tests, then every figure of the Triton kernels, then whole models.

    python -m bench.gpu.everything                  # about 8 minutes; writes bench/results/gpu-NAME.json and .png
    python -m bench.gpu.everything --skip-tests --only gain,training
    python -m bench.gpu.everything --only tests     # the GPU tests alone, added to the JSON that is there
    python -m bench.gpu.everything --device cpu     # a rehearsal without a GPU, small, by the references; no JSON

No network, no pip and no build (the GPU path needs no C++, and called in the repository's root it takes prunekern from
there); runs on PyTorch 2.11 with Triton 3.6 and newer. Answers come first: a case whose kernel is off by more than the
rounding of its dtype gives no figures. Every part is a process of its own, so that one that dies takes no other along,
and the JSON is written after each; what failed is in its "errors". The tests come last, as most of their time is
compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bench.common import report
from bench.common.report import ROOT
from bench.gpu import layers
from bench.gpu.timing import ceilings
from prunekern import kernels

MODULE = "bench.gpu.everything"
PARTS = ("gain", "training", "passes", "routes", "compact", "models", "decoders")
LIMIT = 570  # seconds in all
LEAST = 20  # seconds, below which nothing is started any more
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


def run_tests(out: Path, limit: float) -> dict:
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
        "gain": lambda: layers.gain(device, 1e10, 1e11, shapes, ranks, fp32),
        "training": lambda: layers.training(device, shapes, ranks, 32, fp32),
        "compact": lambda: layers.compact(device, shapes, (1, 16), 0.25, fp32),
        "models": lambda: models(device, rehearsal=True),
        "decoders": lambda: decoders(device, rehearsal=True),
    }


def full(device: torch.device, copy_bytes: float, product_flops: float) -> dict:
    return {
        "gain": lambda: layers.gain(device, copy_bytes, product_flops),
        "training": lambda: layers.training(device),
        "passes": lambda: layers.passes(device, copy_bytes),
        "routes": lambda: layers.routes(device),
        "compact": lambda: layers.compact(device),
        "models": lambda: models(device),
        "decoders": lambda: decoders(device),
    }


def run_cases(cases: Iterable[Callable[[], dict | list[dict]]]) -> Iterator[dict]:
    """Rows; of a case that fails, {"error": traceback}."""
    for case in cases:
        try:
            rows = case()
        except (Exception, SystemExit):  # one wrong answer must not take the other figures along
            rows = {"error": traceback.format_exc()}
        yield from rows if isinstance(rows, list) else (rows,)


def run_part(name: str, facts: dict, folder: Path, limit: float, device: str = "cuda") -> tuple[list[dict], list[str]]:
    """(rows, errors) of a part, in a process of its own that adds each row to a file as it comes."""
    file = folder / f"{name}.jsonl"
    file.touch()
    ceilings = json.dumps({key: facts[key] for key in ("copy_bytes", "product_flops")})
    options = ["--device", device, "--part", name, "--rows", str(file), "--facts", ceilings]
    errors = []
    try:
        code = subprocess.run([sys.executable, "-m", MODULE, *options], timeout=limit, cwd=ROOT).returncode
        if code:
            errors.append(f"the process ended with {code}")
    except subprocess.TimeoutExpired:
        errors.append(f"time was up after {limit:.0f} s")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [r for r in found if "error" not in r], [r["error"] for r in found if "error" in r] + errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default=",".join((*PARTS, "tests")), help=f"of {', '.join(PARTS)}, tests")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--out", default=str(report.RESULTS))
    for hidden in ("--part", "--rows", "--facts"):  # of the process of a part
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    only = args.only.split(",")
    if not set(only) <= {*PARTS, "tests"}:
        parser.error(f"--only: {args.only!r} must name some of {', '.join(PARTS)}, tests")
    if args.device == "cuda" and (not torch.cuda.is_available() or kernels.problem()):
        parser.error(
            f"--device cuda: {kernels.problem() or 'there is no GPU that PyTorch sees'}; --device cpu rehearses"
        )
    device = torch.device(args.device)
    if args.part:
        parts = small(device) if args.device == "cpu" else full(device, **json.loads(args.facts))
        with open(args.rows, "a") as file:
            for row in run_cases(parts[args.part]()):
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    if args.device == "cpu":
        for name in small(device):
            if name in only:
                rows = list(run_cases(small(device)[name]()))
                report.table(name, rows)
                if any("error" in row for row in rows):
                    sys.exit(1)
        return
    measure(device, [name for name in PARTS if name in only], "tests" in only and not args.skip_tests, Path(args.out))


def measure(device: torch.device, names: list[str], tests: bool, out: Path) -> None:
    """Parts and tests, into the JSON of this GPU: what it holds of other parts stays."""
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name()
    path = out / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"
    facts = report.read_file(path) if path.exists() else {}
    facts |= {"command": f"python -m {MODULE}", "gpu": gpu, "torch": torch.__version__, **ceilings(device)}
    facts |= {"triton": __import__("triton").__version__, "python": sys.version.split()[0]}
    facts["errors"] = {name: found for name, found in facts.get("errors", {}).items() if name not in names}
    print(f"{gpu}: copy {facts['copy_bytes'] / 1e12:.2f} TB/s, product {facts['product_flops'] / 1e12:.0f} TFLOP/s")
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = LIMIT - (time.perf_counter() - start)
            rows, errors = run_part(name, facts, Path(folder), left) if left > LEAST else ([], ["no time was left"])
            facts.pop(name, None)
            if rows:
                facts[name] = rows
                report.table(name, rows)
            if errors:
                facts["errors"][name] = errors
                print(f"{name}:", *errors, sep="\n")
            _write(path, facts, start)
    if tests:
        left = LIMIT - (time.perf_counter() - start)
        facts["tests"] = run_tests(out, left) if left > LEAST else {"green": False, "exit": "no time was left"}
        _write(path, facts, start)
    if kept(facts):
        report.table("promises", kept(facts))
    plot(facts, gpu, path.with_suffix(".png"))
    print(f"wrote {path.name}")
    sys.exit(bool(facts["errors"]) or not facts.get("tests", {"green": True})["green"])


def _write(path: Path, facts: dict, start: float) -> None:
    facts["seconds"], facts["promises"] = round(time.perf_counter() - start), kept(facts)
    report.write_file(path, facts)
    print(f"{facts['seconds']} s so far", flush=True)


def models(device, **options) -> list:
    from bench.gpu.models import models as cases  # transformers may be missing or another one

    return cases(device, **options)


def decoders(device, **options) -> list:
    from bench.gpu.models import decoders as cases

    return cases(device, **options)


if __name__ == "__main__":
    main()
