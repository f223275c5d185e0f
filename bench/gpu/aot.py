"""Do the Triton kernels compile for every GPU we ship block sizes for, without spills, onto the matrix units?

    python -m bench.gpu.aot                              # all kernels, five architectures, no GPU needed
    python -m bench.gpu.aot --architecture sm_90 --match fused

Read from the compiled code: registers, shared memory against the architecture's limit, spills and stack, the kind of
matrix instructions, the widest global loads. Exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.common import progress, report
from bench.gpu.aot_cases import SHARED, TARGETS, Case, cases

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = {
    "sm_80": ("HMMA",),
    "sm_86": ("HMMA",),
    "sm_90": ("HGMMA",),
    "sm_100": ("UTCHMMA", "UTCMMA"),
    "gfx942": ("MFMA",),
}
# Few rows: 16 is less than the 64 that HGMMA and tcgen05 take.
SMALL = {"sm_90": ("HMMA", "HGMMA"), "sm_100": ("HMMA", "UTCHMMA", "UTCMMA")}


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture[3:]), 32)


def build(case: Case):
    """Compiled as for aligned pointers and strides that are multiples of 16: the usual case."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    sizes = ["N", "K", "H", "n_out", "n_cols", "chunk", "k_chunk"]
    rank = re.search(r"rank (\d+)", case.label)
    if rank and int(rank[1]) % 16 == 0:
        sizes.append("r")
    aligned = [
        i
        for i, n in enumerate(names)
        if n in case.types and (case.types[n].startswith("*") or n.endswith("stride") or n in sizes)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.kernel, signature, {(names.index(n),): v for n, v in case.constants.items()}, attributes)
    return triton.compile(source, target=target_of(case.architecture), options=dict(case.options))


def examine(case: Case) -> dict:
    """One row of the table; "broken" names what does not hold."""
    made = build(case)
    row = {
        "kernel": case.kernel.__name__.removesuffix("_kernel"),
        "what": case.label,
        "architecture": case.architecture,
        "warps": made.metadata.num_warps,
        "stages": case.options.get("num_stages"),
        "shared_kB": round(made.metadata.shared / 1024, 1),
    }
    row |= _nvidia(made.asm["cubin"]) if case.architecture.startswith("sm") else _amd(made.asm["amdgcn"])
    broken = []
    if made.metadata.shared > SHARED[case.architecture]:
        broken.append("shared memory")
    if row["spills"] or row["stack"]:
        broken.append("spills")
    wanted = MMA[case.architecture]
    height = next(case.constants[n] for n in ("BLOCK_M", "BLOCK_T", "BLOCK_N") if n in case.constants)
    if height < 64:
        wanted = SMALL.get(case.architecture, wanted)
    if case.mma and not any(kind in row["mma"].split("+") for kind in wanted):
        broken.append(f"no {'/'.join(wanted)}")
    if case.mma and row["load_bytes"] < 16:
        broken.append("no 16-byte loads")
    return {**row, "broken": ", ".join(broken) or None}


def _nvidia(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    kinds = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTC[A-Z]*MMA|QGMMA|DMMA|IMMA)\b", sass)))
    loads = [int(w) // 8 for w in re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z0-9.]*?\.?(64|128)\b", sass)]
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found.get("LOCAL", 0),
        "spills": local,
        "mma": "+".join(kinds) or "-",
        "load_bytes": max(loads, default=4),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _amd(assembly: str) -> dict:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    widths = {"x4": 16, "x2": 8, "": 4}
    loads = [widths.get(w, 4) for w in re.findall(r"\b(?:global|buffer)_load_dword(x4|x2|)\b", assembly)]
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "mma": "MFMA" if "v_mfma" in assembly else "-",
        "load_bytes": max(loads, default=4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", choices=TARGETS)
    parser.add_argument("--match", default="", help="kernels whose name and label hold this")
    parser.add_argument("--out", default="aot")
    args = parser.parse_args()
    chosen = [c for c in cases(args.architecture or TARGETS) if args.match in c.name]
    chosen += [
        c for c in cases(args.architecture or TARGETS, (torch.float16,), ranks=(16,)) if args.match in c.name and c.mma
    ]
    rows = [examine(case) for case in progress.track(chosen, "compiling")]
    report.table(f"triton {triton.__version__}, compiled ahead of time", rows)
    broken = [r for r in rows if r["broken"]]
    if not args.match and not args.architecture:
        report.write(args.out, triton=triton.__version__, rows=rows)
    print(f"{len(rows)} kernels compiled, {len(broken)} break a promise")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
