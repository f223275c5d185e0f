"""Kernels compiled ahead of time without a GPU, a representative part: bench/gpu/aot.py does all of them."""

import re

import pytest
import torch

from bench.gpu.aot import build, examine
from bench.gpu.aot_cases import cases

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
    assert ".param .u64" in build(case).asm["ptx"]


NARROW = [c for c in cases(("sm_90",), BF16, ranks=(16,)) if "gain_finish" not in c.name]


@pytest.mark.parametrize("case", NARROW, ids=lambda c: c.name)
def test_rows_are_reached_by_64_bit_products(case):
    """Sizes and strides fit 32 bits here, their product need not."""
    assert re.search(r"arith\.muli .*tensor<\d+x1xi64>|arith\.muli .*tensor<1x\d+xi64>", build(case).asm["ttir"])
