"""Tests of numbers once more on every instruction set of this CPU: one child process each, as a process has one set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunekern import _native
from tests.helpers.compact_linears import native

HERE = Path(__file__).parent
IN_FP32 = ("generic", "avx2", "avx512")  # the others multiply fp32 as one of these does
FP32 = {"test_compact_linear.py": ("test_packed_against_float64", "test_strided_inputs")}
NARROW = {
    "test_quantized.py": (
        "test_packed_against_the_reference",
        "test_mlp_against_the_reference",
        "test_rows_that_cannot_be_rounded",
    ),
    "test_int4.py": ("test_packing", "test_what_each_word_does", "test_mlp"),
}


@pytest.mark.slow
@native
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"])
def test_every_instruction_set(isa):
    environment = {**os.environ, "PRUNEKERN_ISA": isa}
    if isa not in _native._C.supported_isas():
        code = "from prunekern import _native; _native.core()"
        child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert child.returncode != 0 and f"cannot run {isa}" in child.stderr
        return
    files = NARROW | (FP32 if isa in IN_FP32 else {})
    tests = [f"{HERE / file}::{name}" for file, names in files.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    child = subprocess.run(
        [*command, f"{__file__}::test_the_set_is_the_one_asked_for"], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout[-2000:]
    assert "skipped" not in child.stdout


@native
def test_the_set_is_the_one_asked_for():
    assert os.environ.get("PRUNEKERN_ISA") in (None, _native.core().isa())
