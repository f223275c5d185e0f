"""PyTorch's bf16 products kill the process on some CPUs: whether they would here."""

from __future__ import annotations

from ..ops.narrow import bf16_matmul_crashes as bf16_matmul_crashes

REMEDY = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16"
BF16_REASON = (
    "PyTorch's bf16 matrix product dies with an illegal instruction on this CPU (oneDNN sees AMX announced without its "
    f"tile palettes). Train in fp32, or start Python with {REMEDY}"
)
