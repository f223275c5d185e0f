"""What bench/gpu/aot.py and the tests compile ahead of time: every kernel, with the flags that change its code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton.language as tl

from prunekern.kernels import launch
from prunekern.kernels.compact_finish import compact_finish_kernel
from prunekern.kernels.compact_linear import compact_linear_kernel
from prunekern.kernels.compact_mlp import compact_gated_kernel
from prunekern.kernels.dora_gain import (
    AS_IT_IS,
    MOST_FACTORED,
    dora_gain_factored_kernel,
    dora_gain_finish_kernel,
    dora_gain_kernel,
)
from prunekern.kernels.dora_linear import dora_backward_kernel, dora_compose_kernel, dora_fused_kernel
from prunekern.kernels.dora_merge import dora_merge_kernel

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TL = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
RANKS = (8, 16, 64, 384)
# Largest shared memory of a block, bytes.
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Case:
    """One kernel, one architecture, one set of constants. `mma`: 16-bit products, so matrix units must be used."""

    kernel: object
    label: str
    architecture: str
    types: dict  # argument -> Triton's type
    constants: dict
    options: dict
    mma: bool
    wide: tuple = ()  # pointers whose contiguous rows must be read 16 bytes at a time

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.label} {self.architecture}"


def _case(kernel, label, architecture, types, constants, chosen, mma) -> Case:
    options = {name: chosen[name] for name in ("num_warps", "num_stages") if name in chosen}
    blocks = {name: value for name, value in chosen.items() if name not in options}
    return Case(kernel, label, architecture, types, {**constants, **blocks}, options, mma)


def cases(
    architectures=TARGETS, dtypes=(torch.bfloat16, torch.float32), ranks=RANKS, wide_offsets=False
) -> Iterator[Case]:
    """wide_offsets: sizes and strides as 64-bit integers, as Triton takes them where they pass 2^31."""
    integer = "i64" if wide_offsets else "i32"
    for architecture in architectures:
        for dtype in dtypes:
            yield from _dora(architecture, dtype, ranks, integer)
            yield from _compact(architecture, dtype, integer)
        types = {name: "*fp32" for name in ("partial", "v_sqnorm", "m", "m_b", "gain", "inv_norm")} | {"N": integer}
        constants = {"HAS_MASK": True, "FACTORED": True, "SPLIT": 4}
        yield _case(
            dora_gain_finish_kernel, "", architecture, types, constants, {"BLOCK_N": 128, "num_warps": 4}, False
        )


def _dora(architecture, dtype, ranks, integer) -> Iterator[Case]:
    pointer, mma = f"*{NAMES[dtype]}", dtype.itemsize == 2
    constants = {"PRECISION": launch.precision(dtype, architecture)}

    def typed(pointers: str, fp32: str, integers: str, i64: str = "") -> dict:
        return (
            {name: pointer for name in pointers.split()}
            | {name: "*fp32" for name in fp32.split()}
            | {name: "*i64" for name in i64.split()}
            | {name: integer for name in integers.split()}
            | {"s": "fp32"}
        )

    for r in ranks:
        label = f"{NAMES[dtype]} rank {r}"
        types = typed("V A", "B v_sqnorm m m_b partial gain inv_norm", "N K r v_stride a_stride b_stride k_chunk")
        factored = mma and r <= MOST_FACTORED
        chosen = launch.by_rank("dora_gain_factored" if factored else "dora_gain", architecture, dtype, r)
        types["B"] = "*fp32" if chosen["ONE_BLOCK"] else pointer
        types["A"] = "*fp32" if r <= AS_IT_IS else pointer
        for split in (1, 4) if chosen["ONE_BLOCK"] else (16,):
            some = {**constants, "HAS_MASK": True, "SPLIT": split}
            kernel = dora_gain_factored_kernel if factored else dora_gain_kernel
            if factored:
                del some["PRECISION"]
                chosen.pop("ONE_BLOCK", None)
                some["SPLIT_G"] = not architecture.startswith("gfx")
            yield _case(kernel, f"{label} split {split}", architecture, types, some, chosen, mma)
        types = typed("z p B y", "gain bias", "T N r p_stride b_stride chunk")
        chosen = launch.by_rank("dora_compose", architecture, dtype, r)
        one_block = chosen.pop("ONE_BLOCK")
        some = {**constants, "HAS_BIAS": True, "ADD_LOW": one_block}
        yield _case(dora_compose_kernel, label, architecture, types, some, chosen, mma and one_block)
        rank = {"BLOCK_R": chosen["BLOCK_R"], "ONE_BLOCK": one_block}
        types = typed("x V p B y z", "gain bias", "T N K r x_stride v_stride p_stride b_stride")
        for keep_z in (True, False):
            some = {**constants, **rank, "HAS_BIAS": True, "KEEP_Z": keep_z}
            chosen = launch.pick("dora_fused", architecture, dtype, 16)
            end = f"{label}{', z kept' if keep_z else ''}"
            yield _case(dora_fused_kernel, end, architecture, types, some, chosen, mma)
        types = typed("dy z p B dz", "gain bias d_gain d_bias d_probe", "T N r dy_stride p_stride b_stride chunk")
        chosen = launch.by_rank("dora_backward", architecture, dtype, r)
        want = {"WANT_DZ": True, "WANT_GAIN": True, "WANT_BIAS": True, "HAS_BIAS": True}
        one_block = chosen.pop("ONE_BLOCK")
        for add_low, probe in ((False, False), (False, True), (True, True))[: 3 if one_block else 2]:
            some = {**constants, **want, "ADD_LOW": add_low, "WANT_PROBE": probe}
            end = f"{label}{', low rank added' if add_low else ''}{', probe' if probe else ''}"
            yield _case(dora_backward_kernel, end, architecture, types, some, chosen, mma and add_low)
        types = typed("V W", "A B gain", "n_rows n_cols r s v_stride a_stride b_stride", "rows cols") | {"s": "fp32"}
        some = {"PRECISION": launch.precision(torch.float32, architecture), "HAS_ROWS": True, "HAS_COLS": True}
        chosen = launch.by_rank("dora_merge", architecture, torch.float32, r)
        yield _case(dora_merge_kernel, label, architecture, types, some, chosen, False)


def _compact(architecture, dtype, integer) -> Iterator[Case]:
    pointer, mma = f"*{NAMES[dtype]}", dtype.itemsize == 2
    constants = {"PRECISION": launch.precision(dtype, architecture), "DOT": TL[dtype]}
    for rows in (1, 4096):
        chosen = launch.pick("compact_linear", architecture, dtype, rows)
        types = {name: pointer for name in ("x", "W", "bias", "residual", "y")} | {"scale": "*fp32"}
        types |= {"in_index": "*i64", "out_index": "*i64"}
        types |= {n: integer for n in ("M", "N", "K", "n_out", "x_stride", "w_stride", "residual_stride")}
        flags = {"HAS_BIAS": True, "ACTIVATION": "none"}
        for what, gather, scatter, residual, activation in (
            ("contiguous, gelu", False, False, False, "gelu"),
            ("scatter + residual", False, True, True, "none"),
            ("gather", True, False, False, "none"),
            ("gather, scatter", True, True, False, "silu"),
        ):
            some = {**constants, **flags, "HAS_SCALE": False, "GATHER": gather, "SCATTER": scatter, "SEARCH": 12}
            some |= {"HAS_RESIDUAL": residual, "ACTIVATION": activation}
            label = f"{NAMES[dtype]} {what}, {rows} row{'s' if rows > 1 else ''}"
            yield _case(compact_linear_kernel, label, architecture, types, some, chosen, mma)
        some = {**constants, **flags, "HAS_SCALE": True, "GATHER": False, "SCATTER": True, "HAS_RESIDUAL": True}
        some["SEARCH"] = 12
        label = f"{NAMES[dtype]} int8 weight, {rows} row{'s' if rows > 1 else ''}"
        yield _case(compact_linear_kernel, label, architecture, {**types, "W": "*i8"}, some, chosen, mma)
        chosen = launch.pick("compact_gated", architecture, dtype, rows)
        types = {name: pointer for name in ("x", "up", "gate", "up_bias", "gate_bias", "hidden")}
        types |= {"up_scale": "*fp32", "gate_scale": "*fp32", "in_index": "*i64"}
        types |= {n: integer for n in ("M", "H", "K", "x_stride", "up_stride", "gate_stride")}
        some = {**constants, "HAS_UP_BIAS": True, "HAS_GATE_BIAS": True, "HAS_UP_SCALE": False, "HAS_GATE_SCALE": False}
        some |= {"GATHER": False, "ACTIVATION": "silu"}
        label = f"{NAMES[dtype]}, {rows} row{'s' if rows > 1 else ''}"
        yield _case(compact_gated_kernel, label, architecture, types, some, chosen, mma)
    chosen = launch.pick("compact_finish", architecture, dtype, 4096)
    types = {name: pointer for name in ("z", "up", "bias", "up_bias", "residual", "y")} | {"out_index": "*i64"}
    types |= {n: integer for n in ("M", "N", "n_out", "z_stride", "residual_stride", "chunk")}
    for what, scatter, gated in (("scatter + residual", True, False), ("gate", False, True)):
        some = {"HAS_BIAS": True, "HAS_UP": gated, "HAS_UP_BIAS": gated, "SCATTER": scatter, "HAS_RESIDUAL": scatter}
        some |= {"ACTIVATION": "silu" if gated else "none", "SEARCH": 12 if scatter else 0}
        yield _case(compact_finish_kernel, f"{NAMES[dtype]} {what}", architecture, types, some, chosen, False)
