"""Kernels compiled ahead of time without a GPU, a representative part: bench/aot.py does all of them."""

import pytest
import torch
from aot import build, examine
from aot_cases import cases

BF16 = (torch.bfloat16,)
PART = [c for a in ("sm_80", "sm_90") for c in cases((a,), BF16, ranks=(16,))]
PART += [c for c in cases(("sm_90",), BF16, ranks=(384,)) if "rank" in c.label]
PART += [c for c in cases(("sm_90",), (torch.float32,), ranks=(64,)) if "rank" in c.label]
PART += [c for a in ("sm_86", "sm_100", "gfx942") for c in cases((a,), BF16, ranks=(64,)) if "fused" in c.name]
WIDE = [c for c in cases(("sm_90",), BF16, ranks=(16,), wide_offsets=True)]


@pytest.mark.parametrize("case", PART, ids=lambda c: c.name)
def test_no_spills_and_matrix_units(case):
    row = examine(case)
    assert row["broken"] is None, row
    assert row["registers"] > 0 and row["load_bytes"] in (4, 8, 16)


@pytest.mark.parametrize("case", WIDE, ids=lambda c: c.name)
def test_sizes_over_two_to_the_31_compile(case):
    """Strides and sizes as 64-bit integers: rows are then reached by 64-bit products, never 32-bit ones."""
    made = build(case)
    assert "mul.wide" in made.asm["ptx"] or "mul.lo.s64" in made.asm["ptx"] or "mad.lo.s64" in made.asm["ptx"]
