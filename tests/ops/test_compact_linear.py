"""compact_linear: numbers against float64, threads, and everything it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

from prunekern import _native
from prunekern.ops import compact_linear, pack_weight, unpack_weight
from prunekern.ops.compact_linear import ACTIVATIONS, compact_linear_reference
from tests.helpers.compact_linears import assert_close, kept, naive, native


@native
@pytest.mark.parametrize("m", [0, 1, 5, 129])
@pytest.mark.parametrize("n", [0, 1, 577])
@pytest.mark.parametrize("k", [0, 1, 372])
def test_packed_against_float64(m, n, k):
    for trial, activation in enumerate(ACTIVATIONS):
        for gather, scatter, with_bias, with_residual in ((0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 0), (1, 1, 0, 1)):
            torch.manual_seed(trial)
            in_features, n_out = k + 7 * gather, n + 50 * scatter
            x, weight = torch.randn(m, in_features), torch.randn(n, k)
            bias = torch.randn(n) if with_bias else None
            in_index = kept(k, in_features) if gather else None
            out_index = kept(n, n_out) if scatter else None
            residual = torch.randn(m, n_out) if with_residual else None
            args = (bias, in_index, out_index, n_out, activation, residual)
            expected = naive(x, weight, *args)
            packed = pack_weight(weight)
            for _ in range(2):  # the second call takes the short way
                assert_close(compact_linear(x, packed, *args), *expected)
            assert_close(compact_linear(x, weight, *args), *naive(x, weight, *args, torch_tails=True))


def test_unknown_instruction_set_is_refused():
    text = _child("from prunekern import _native; print(_native.available(), _native.why_not())", PRUNEKERN_ISA="sse9")
    if _native._C is not None:
        assert text == (
            "False no C++ kernels: PRUNEKERN_ISA must be generic, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 or "
            "amx (got sse9)"
        )
        code = "import warnings; warnings.simplefilter('always'); import prunekern.ops"
        environment = {**os.environ, "PRUNEKERN_ISA": "sse9"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert "PyTorch is used in place of the C++ kernels" in result.stderr


@native
def test_strided_inputs():
    weight, bias = torch.randn(70, 33), torch.randn(70)
    packed, wide = pack_weight(weight), torch.full((6, 5, 90), float("nan"))
    wide[..., 20:53] = torch.randn(6, 5, 33)
    cases = {
        "rows apart": wide[:, 0, 20:53],
        "leading dimensions apart": wide[:, ::2, 20:53],
        "transposed": torch.randn(33, 9).T,
        "one row for all": torch.randn(1, 33).expand(4, 33),
        "every other column": torch.randn(4, 66)[:, ::2],
        "1-D": torch.randn(33),
        "4-D": torch.randn(2, 3, 4, 33),
    }
    for name, x in cases.items():
        residual = torch.randn(2, *x.shape[:-1], 70)[1].mT.contiguous().mT if x.dim() > 1 else torch.randn(70)
        args = (bias, None, None, 70, "gelu", residual)
        for _ in range(2):
            got = compact_linear(x, packed, *args)
            assert got.is_contiguous(), name
            assert_close(got, *naive(x, weight, *args))


@native
def test_nothing_is_read_or_written_outside():
    """Freed memory full of NaN is what torch.empty hands out next: a value left unwritten or read shows."""
    weight, out_index = torch.randn(33, 17), kept(33, 200)
    packed = pack_weight(weight)
    for m in (1, 2, 5, 14, 15, 31):
        x = torch.randn(m, 17)
        expected = naive(x, weight, None, None, out_index, 200, "none", None)
        for _ in range(3):
            poison = torch.full((m, 200), float("nan"))
            del poison
            assert_close(compact_linear(x, packed, None, None, out_index, 200), *expected)


@native
def test_many_rows_and_threads():
    x, weight, bias = torch.randn(517, 130), torch.randn(300, 130), torch.randn(300)
    packed, out_index = pack_weight(weight), kept(300, 400)
    args = (bias, None, out_index, 400, "silu", torch.randn(517, 400))
    expected = naive(x, weight, *args)
    alone = compact_linear(x, packed, *args)
    assert_close(alone, *expected)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_close(compact_linear(x, packed, *args), *expected)
        few = compact_linear(x[:2], packed, *args[:-1], args[-1][:2])  # split over channels
        assert_close(few, expected[0][:2], expected[1][:2])


@native
def test_two_python_threads_at_once():
    weight = torch.randn(257, 200)
    packed, inputs = pack_weight(weight), [torch.randn(m, 200) for m in (3, 40, 150, 7)]
    expected = [naive(x, weight, None, None, None, 257, "gelu", None) for x in inputs]
    failures = []

    def work(x, want):
        try:
            for _ in range(50):
                assert_close(compact_linear(x, packed, None, None, None, 257, "gelu"), *want)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@native
def test_after_fork_on_one_thread():
    """With one thread no OpenMP region is entered: a forked child does not wait for threads it does not have."""
    code = """
import os, torch
torch.set_num_threads(2)
from prunekern.ops import compact_linear, pack_weight
x, w = torch.randn(200, 64), torch.randn(64, 64)
p = pack_weight(w)
y = compact_linear(x, p, None, None, None, 64)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    same = torch.allclose(compact_linear(x, p, None, None, None, 64), y, atol=1e-4)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert _child(code) == "0"


@native
def test_one_thread_starts_no_other():
    code = """
import os, torch
torch.set_num_threads(1)
from prunekern.ops import compact_linear, pack_weight
p = pack_weight(torch.randn(512, 512))
before = len(os.listdir("/proc/self/task"))
compact_linear(torch.randn(512, 512), p, None, None, None, 512)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert _child(code) == "0"


@native
def test_pack_round_trip():
    for n, k in ((1, 1), (33, 5), (577, 372), (0, 4), (4, 0), (768, 768)):
        weight = torch.randn(n, k)
        assert torch.equal(unpack_weight(pack_weight(weight), n), weight)
    wide = torch.randn(9, 2 * 11)
    assert torch.equal(unpack_weight(pack_weight(wide[:, ::2]), 9), wide[:, ::2])
    assert torch.equal(unpack_weight(pack_weight(wide.T), 22), wide.T)


def test_plain_float64_is_computed_in_float64():
    x, weight, bias = torch.randn(5, 64).double(), torch.randn(7, 64).double(), torch.randn(7).double()
    got = compact_linear(x, weight, bias, None, kept(7, 9), 9, "gelu", torch.zeros(5, 9).double())
    assert got.dtype == torch.float64
    index = compact_linear(torch.ones(1, 0).double(), weight[:, :0], bias.abs(), None, None).nonzero()[:, 1]
    assert index.tolist() == list(range(7))  # K = 0: the bias alone
    y, _ = naive(x, weight, bias, None, None, 7, "gelu", None)
    assert (compact_linear(x, weight, bias, None, None, 7, "gelu") - y).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_half_types_compute_in_fp32(dtype):
    """Checked in a child: a bf16 matrix product would kill the process on some machines."""
    code = f"""
import torch
from prunekern.ops import compact_linear
x, w, b = (torch.randn(*s).to({dtype}) for s in ((5, 64), (7, 64), (7,)))
y = compact_linear(x, w, b, None, None, 7, "silu")
exact = torch.nn.functional.silu(x.double() @ w.double().T + b.double())
assert y.dtype == {dtype}
# One rounding to the half type at the end: half a unit in its last place.
assert ((y.double() - exact).abs() <= torch.finfo({dtype}).eps / 2 * exact.abs() * 1.001 + 1e-6).all()
print("ok")
"""
    assert _child(code) == "ok"


# --- what is refused ---------------------------------------------------------------------------------------------

GOOD = {
    "x": torch.zeros(4, 12), "packed": None, "bias": torch.zeros(40), "in_index": None, "out_index": None, "n_out": 40,
    "activation": "none", "residual": None,
}  # fmt: skip
X768 = {"x": torch.zeros(4, 768), "in_index": torch.arange(12)}
BAD = {
    "in_index too large": (
        {**X768, "in_index": torch.tensor([*range(11), 801])},
        "compact_linear: in_index must be sorted and < 768 (got 801 at position 11)",
    ),
    "in_index unsorted": (
        {**X768, "in_index": torch.tensor([5, 3, *range(6, 16)])},
        "compact_linear: in_index must be sorted and < 768 (got 3 at position 1)",
    ),
    "in_index duplicated": (
        {**X768, "in_index": torch.tensor([5, 5, *range(6, 16)])},
        "compact_linear: in_index must be sorted and < 768 (got 5 at position 1)",
    ),
    "in_index negative": (
        {**X768, "in_index": torch.arange(-1, 11)},
        "compact_linear: in_index must be sorted and < 768 (got -1 at position 0)",
    ),
    "in_index too short": ({**X768, "in_index": torch.arange(11)}, "compact_linear: "),
    "in_index int32": (
        {**X768, "in_index": torch.arange(12, dtype=torch.int32)},
        "compact_linear: in_index must be int64 (got torch.int32)",
    ),
    "in_index 2-D": ({**X768, "in_index": torch.arange(12)[None]}, "compact_linear: "),
    "out_index too large": (
        {"out_index": torch.arange(40) + 11, "n_out": 50},
        "compact_linear: out_index must be sorted and < 50 (got 50 at position 39)",
    ),
    "out_index longer than the weight": ({"out_index": torch.arange(73), "n_out": 80}, "compact_linear: "),
    "out_index int32": (
        {"out_index": torch.arange(40, dtype=torch.int32)},
        "compact_linear: out_index must be int64 (got torch.int32)",
    ),
    "n_out": ({"n_out": 73}, "compact_linear: "),
    "bias too long": ({"bias": torch.zeros(41)}, "compact_linear: bias must have shape [40] (got [41])"),
    "bias dtype": ({"bias": torch.zeros(40).double()}, "compact_linear: bias must be torch.float32 like x"),
    "residual shape": (
        {"residual": torch.zeros(4, 41)},
        "compact_linear: residual must have shape [4, 40] (got [4, 41])",
    ),
    "residual dtype": ({"residual": torch.zeros(4, 40).double()}, "compact_linear: residual must be torch.float32"),
    "x dtype": ({"x": torch.zeros(4, 12).double()}, "compact_linear: packed must be torch.float64 like x"),
    "x int": ({"x": torch.zeros(4, 12).long()}, "compact_linear: x must be float64, float32"),
    "x width": ({"x": torch.zeros(4, 13)}, "compact_linear: "),
    "x scalar": ({"x": torch.tensor(1.0)}, "compact_linear: "),
    "x device": ({"x": torch.zeros(4, 12, device="meta")}, "compact_linear: packed is on cpu, x on meta"),
    "bias device": ({"bias": torch.zeros(40, device="meta")}, "compact_linear: bias is on meta, x on cpu"),
    "activation": (
        {"activation": "sigmoid"},
        "compact_linear: activation must be one of none, relu, gelu, gelu_tanh, silu, quick_gelu (got 'sigmoid')",
    ),
}


@pytest.mark.parametrize("form", ["plain", pytest.param("packed", marks=native)])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("called_before", [False, True])
def test_bad_arguments(case, form, called_before):
    changes, message = BAD[case]
    weight = torch.zeros(40, 12)
    good = {**GOOD, "packed": pack_weight(weight) if form == "packed" else weight}
    if called_before:
        compact_linear(**good)
    for function in (compact_linear, torch.ops.prunekern.compact_linear):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            function(**{**good, **changes})


@native
def test_bad_packed():
    x, packed = torch.zeros(4, 12), pack_weight(torch.zeros(40, 12))
    with pytest.raises(ValueError, match=r"packed has panels of 24 channels.*pack_weight the plain weight again"):
        compact_linear(x, torch.zeros(2, 12, 24), None, None, None, 40)
    with pytest.raises(ValueError, match=r"packed must have shape \[\*, \*\]"):
        compact_linear(x, torch.zeros(40), None, None, None, 40)
    with pytest.raises(TypeError, match="packed must be contiguous"):
        compact_linear(x, packed.transpose(0, 1).contiguous().transpose(0, 1), None, None, None, 40)
    with pytest.raises(TypeError, match="packed must be contiguous float32"):
        compact_linear(x.double(), packed.double(), None, None, None, 40)
    with pytest.raises(ValueError, match="n_out is needed"):
        compact_linear(x, packed)
    with pytest.raises(TypeError, match="weight must be float32, bfloat16, int8 or uint8 .int4. on cpu"):
        pack_weight(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight must have shape"):
        pack_weight(torch.zeros(4))
    with pytest.raises(ValueError, match=r"packed must have shape"):
        unpack_weight(packed, 400)


def test_without_the_core_only_packing_is_refused():
    """As on a machine without a compiler: the plain form works, packing says what is missing."""
    code = """
import sys
sys.modules["prunekern._C"] = None
import torch
from prunekern.ops import compact_linear, pack_weight
from prunekern import _native
assert not _native.available()
assert compact_linear(torch.ones(2, 3), torch.ones(4, 3)).tolist() == [[3.0] * 4] * 2
try:
    pack_weight(torch.ones(4, 3))
except RuntimeError as error:
    print(error)
"""
    text = _child(code)
    assert text.startswith("no C++ kernels: ") and "apt-get install g++" in text and "\n" not in text


@native
def test_eager_overhead():
    """Design: under 3 us over the C++ call. Asserted at 8 us: shared machines; bench/cpu/layers.py has the figure."""
    x, packed, bias = torch.randn(1, 8), pack_weight(torch.randn(32, 8)), torch.randn(32)
    y = torch.empty(1, 32)
    raw = (x.data_ptr(), 1, 8, 8, packed.data_ptr(), 32, 8, y.data_ptr(), 32, 32, bias.data_ptr())

    def seconds(call, count=2000):
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count

    with torch.no_grad():
        wrapped = min(seconds(lambda: compact_linear(x, packed, bias, None, None, 32)) for _ in range(9))
        inner = min(seconds(lambda: _native._C.compact_linear(*raw)) for _ in range(9))
    assert wrapped - inner < 8e-6


def test_reference_never_calls_the_core(monkeypatch):
    monkeypatch.setattr(_native, "core", lambda: pytest.fail("the reference called the C++ core"))
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    torch.testing.assert_close(compact_linear_reference(x, weight, n_out=5), F.linear(x, weight))


def _child(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh interpreter; fails with its standard error."""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()
