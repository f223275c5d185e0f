"""Block sizes: every shipped architecture and kernel has them, others have a rule; a missing Triton is said once."""

import itertools
import sys
import types

import pytest
import torch

from prunekern import kernels
from prunekern.kernels import launch
from prunekern.kernels.dora_gain import chunks_for

DORA_KERNELS = ("dora_gain_factored", "dora_gain", "dora_compose", "dora_fused", "dora_backward", "dora_merge")
KERNELS = (*DORA_KERNELS, "compact_linear", "compact_gated", "compact_finish")


def test_every_kernel_has_blocks_for_every_size():
    for architecture, kernel, dtype, size in itertools.product(
        ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"), KERNELS, kernels.DTYPES, (1, 16, 17, 64, 65, 512, 10**6)
    ):
        if kernel == "dora_gain_factored" and dtype == torch.float32:
            continue  # never asked for
        chosen = launch.pick(kernel, architecture, dtype, size)
        blocks = {n: v for n, v in chosen.items() if n.startswith("BLOCK")}
        assert chosen["num_warps"] in (1, 2, 4, 8) and chosen["num_stages"] >= 1 and "up_to" not in chosen
        assert all(v >= 16 and v & (v - 1) == 0 for v in blocks.values()), (architecture, kernel, blocks)


def test_rank_blocks_are_powers_of_two_of_at_least_16():
    got = {r: launch.by_rank("dora_compose", "sm_90", torch.bfloat16, r) for r in (1, 16, 17, 64, 65, 512)}
    assert {r: c["BLOCK_R"] for r, c in got.items()} == {1: 16, 16: 16, 17: 32, 64: 64, 65: 64, 512: 64}
    assert [c["ONE_BLOCK"] for c in got.values()] == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("architecture", "shared", "entry"),
    [
        ("sm_90", 232448, "sm_90"), ("sm_89", 101376, "sm_86"), ("sm_120", 101376, "sm_86"), ("sm_70", None, "sm_80"),
        ("sm_103", 232448, "sm_100"), ("gfx950", None, "gfx942"), ("gfx90a", None, "gfx942"),
        ("gfx1100", None, "gfx942"),
    ],
)  # fmt: skip
def test_an_unknown_gpu_takes_the_nearest(architecture, shared, entry):
    assert launch.nearest(architecture, shared) == entry


def test_fp32_products_keep_fp32_accuracy_unless_pytorch_gives_it_up():
    assert launch.precision(torch.float32, "sm_90") == "tf32x3"
    assert launch.precision(torch.float32, "gfx942") == "ieee"
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert launch.precision(torch.float32, "sm_90") == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_triton_that_is_too_old_or_broken_is_said_in_one_line(monkeypatch):
    for module, said in (
        (types.SimpleNamespace(__version__="2.1.0"), "triton is 2.1.0, 3.2 or newer is needed"),
        (None, "triton does not import"),
    ):
        monkeypatch.setitem(sys.modules, "triton", module)
        kernels.problem.cache_clear()
        reason = kernels.problem()
        assert said in reason and "\n" not in reason
    fake = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with pytest.warns(UserWarning, match="PyTorch is used in place of Triton kernels"):
        assert not kernels.usable(fake)
    monkeypatch.undo()
    kernels.problem.cache_clear()


def test_float64_and_a_large_rank_take_the_reference():
    on_gpu = {
        dtype: types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert kernels.usable(on_gpu[torch.bfloat16], on_gpu[torch.float32], None, rank=512)
    assert not kernels.usable(on_gpu[torch.float32], on_gpu[torch.float64])
    with pytest.warns(UserWarning, match="rank 513 is over 512"):
        assert not kernels.usable(on_gpu[torch.float32], rank=513)


def test_cpu_tensors_never_ask_for_triton():
    assert not kernels.usable(torch.zeros(2))


def test_row_blocks_are_cut_so_that_no_multiprocessor_waits_long():
    # 4096 and 11008 rows on 132 multiprocessors: blocks of 32 two at once, blocks of 64 one at once
    assert [chunks_for(*case, 8) for case in ((128, 264), (344, 264), (64, 132), (172, 132))] == [2, 3, 2, 3]
    assert chunks_for(1, 264, 8) == 8 and chunks_for(1, 264, 1) == 1 and chunks_for(1, 264, 0) == 1  # K too small
    assert chunks_for(264, 264, 8) == chunks_for(528, 264, 8) == chunks_for(10_000, 264, 8) == 1
    for tiles in range(1, 600):
        chunks = chunks_for(tiles, 264, 8)
        rounds = -(-tiles * chunks // 264) / chunks  # of a whole row block's length
        assert rounds <= -(-tiles // 264) and (tiles < 200 or tiles / 264 / rounds > 0.8)
