"""Safe around: forks, Python threads, the order of imports, and nothing to compute.

What might hang or die runs in a fresh process with a time limit.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import Tensor

from prunekern import _native
from prunekern.ops import compact_linear, compact_mlp, pack_weight

native = pytest.mark.skipif(not _native.available(), reason=str(_native.why_not()))
LIMIT = 60  # seconds: importing torch takes up to 10 on a busy machine, a hang takes for ever

# What every child starts from: two threads, calls large enough for both, and answers in float64.
PRELUDE = """
import os, sys
{imports}
import torch
from prunekern.ops import compact_linear, compact_mlp, pack_weight

torch.manual_seed(0)
torch.set_num_threads(2)
x, residual = torch.randn(300, 372), torch.randn(300, 400)
up, down = torch.randn(577, 372) / 20, torch.randn(400, 577) / 20
exact = torch.relu(x.double() @ up.double().T)
exact_mlp = residual.double() + exact @ down.double().T
packed_up, packed_down = pack_weight(up), pack_weight(down)

def right():
    y = compact_linear(x, packed_up, None, None, None, 577, "relu")
    z = compact_mlp(x, packed_up, packed_down, n_hidden=577, n_out=400, activation="relu", residual=residual)
    torch.set_num_threads(1)  # torch's own loops hang in a forked child of a process that used two
    good = bool((y - exact).abs().max() < 1e-5) and bool((z - exact_mlp).abs().max() < 1e-5)
    torch.set_num_threads(2)
    return good
"""


def child(code: str, imports: str = "") -> str:
    """stdout of a fresh process that runs PRELUDE and `code`; fails where it hangs, dies or raises."""
    program = PRELUDE.format(imports=imports) + textwrap.dedent(code)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- processes and threads --------------------------------------------------------------------------------------


@native
def test_fork_after_use():
    """libgomp's second thread is gone in the child: a call that waited for it would never return."""
    code = """
    assert right()
    for _ in range(3):  # a child of a used parent, again and again
        pid = os.fork()
        if pid == 0:
            os._exit(0 if right() and right() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print(right())  # and the parent goes on
    """
    assert child(code) == "True"


@native
def test_fork_before_first_use():
    code = """
    pid = os.fork()
    if pid == 0:
        os._exit(0 if right() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    print(right())
    """
    assert child(code) == "True"


@native
def test_data_loader_workers():
    """Forked workers that call the op, after the parent did; their own number of threads is set back to two."""
    code = """
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            shifted = x + i
            torch.set_num_threads(2)
            y = compact_linear(shifted, packed_up, None, None, None, 577, "relu")
            torch.set_num_threads(1)
            return y

    assert right()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    y = torch.cat(list(loader))  # [8, 300, 577]
    wanted = torch.stack([torch.relu((x + i).double() @ up.double().T) for i in range(8)])
    print(bool((y - wanted).abs().max() < 1e-4) and right())
    """
    assert child(code) == "True"


@native
def test_python_threads_at_once():
    """Two callers with two threads each, on shared weights; each checks every answer."""
    torch.set_num_threads(2)
    up, down = torch.randn(577, 372) / 20, torch.randn(400, 577) / 20
    packed_up, packed_down = pack_weight(up), pack_weight(down)
    worst, start = [], threading.Barrier(2)

    def work(seed: int) -> None:
        x = torch.randn(150, 372, generator=torch.Generator().manual_seed(seed))
        hidden = torch.relu(x.double() @ up.double().T)
        wanted = hidden @ down.double().T
        start.wait()
        for _ in range(40):
            y = compact_linear(x, packed_up, None, None, None, 577, "relu")
            z = compact_mlp(x, packed_up, packed_down, n_hidden=577, n_out=400, activation="relu")
            worst.append(max((y - hidden).abs().max().item(), (z - wanted).abs().max().item()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert len(worst) == 80 and max(worst) < 1e-5


@native
@pytest.mark.parametrize("imports", ["import torch; import prunekern._C", "import prunekern._C"])
def test_imports_in_either_order(imports):
    """torch after prunekern._C loads a second OpenMP runtime on some machines: both must go on working."""
    code = """
    a = torch.randn(600, 600)
    good = right()
    b = a @ a  # torch's own threads between ours
    print(good and right() and bool((b - (a.double() @ a.double())).abs().max() < 1e-2))
    """
    assert child(code, imports) == "True"


# --- nothing to compute -----------------------------------------------------------------------------------------


def layers(m: int, k: int, h: int, n: int, packed: bool, kind: torch.dtype) -> tuple[Tensor, ...]:
    """x [m, k], up [h, k], down [n, h], n channels of 9, residual [m, 9]."""
    x, up, down = torch.randn(m, k), torch.randn(h, k).to(kind), torch.randn(n, h).to(kind)
    if packed:
        up, down = pack_weight(up), pack_weight(down)
    out_index = torch.randperm(9)[:n].sort().values
    return x, up, down, out_index, torch.randn(m, 9)


@native
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_nothing_left(m, kind, packed):
    """No rows, no inputs, no intermediate, no outputs: bias and residual are all there is, and no stale memory."""
    if kind is torch.bfloat16 and not packed:
        kind = torch.float32  # a plain bf16 weight goes with 16-bit x only
    for k, h, n in ((0, 6, 4), (3, 0, 4), (3, 6, 0), (0, 0, 0)):
        x, up, down, out_index, residual = layers(m, k, h, n, packed, kind)
        up_bias, down_bias = torch.randn(h), torch.randn(n)
        first = compact_linear(x, up, up_bias, None, None, h, "relu")
        assert first.shape == (m, h)
        if k == 0:
            assert torch.equal(first, torch.relu(up_bias).expand(m, h))
        full = compact_mlp(x, up, down, None, up_bias, down_bias, out_index=out_index, n_hidden=h, n_out=9,
                           activation="relu", residual=residual)  # fmt: skip
        poison = [torch.full((m, 9), torch.nan) for _ in range(4)]  # what the allocator hands out next
        del poison
        alone = compact_linear(first, down, down_bias, None, out_index, 9, "none", residual)
        for y in (full, alone):
            untouched = torch.ones(9, dtype=torch.bool)
            untouched[out_index] = False
            assert torch.equal(y[:, untouched], residual[:, untouched])
            assert bool(y.isfinite().all())
            if h == 0:
                assert torch.allclose(y[:, out_index], residual[:, out_index] + down_bias)
        assert torch.allclose(full, alone, rtol=1e-2 if kind is torch.bfloat16 else 1e-5, atol=1e-5)


@native
def test_no_channels_of_int8_and_empty_index():
    none = torch.zeros(0, dtype=torch.int64)
    x, residual = torch.randn(3, 7), torch.randn(3, 5)
    packed = pack_weight(torch.zeros(0, 0, dtype=torch.int8))
    y = compact_linear(x, packed, None, none, none, 5, "none", residual, torch.zeros(0))
    assert torch.equal(y, residual)
    assert torch.equal(compact_linear(x, packed, None, none, none, 5, scale=torch.zeros(0)), torch.zeros(3, 5))


# --- what is wrong is refused, and the process lives ------------------------------------------------------------


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_wrong_inputs_are_refused_and_the_next_call_works(threads):
    torch.set_num_threads(threads)
    x, up, down = torch.randn(4, 6), torch.randn(8, 6), torch.randn(5, 8)
    a, b = pack_weight(up), pack_weight(down)
    index = torch.tensor([0, 2, 4, 6, 8])
    cases = [
        (ValueError, "compact_linear: x must", lambda: compact_linear(x[:, :5], a, None, None, None, 8)),
        (ValueError, "compact_linear: packed must", lambda: compact_linear(x, a, None, None, None, 99)),
        (ValueError, "compact_linear: bias must", lambda: compact_linear(x, a, torch.zeros(7), None, None, 8)),
        (ValueError, "compact_linear: activation must", lambda: compact_linear(x, a, n_out=8, activation="tanh")),
        (TypeError, "compact_linear: packed must", lambda: compact_linear(x.double(), a, None, None, None, 8)),
        (ValueError, "compact_mlp: out_index must",
         lambda: compact_mlp(x, a, b, out_index=index, n_hidden=8, n_out=8)),
        (ValueError, "compact_mlp: in_index must",
         lambda: compact_mlp(x, a, b, in_index=torch.tensor([0, 1, 2, 3, 5, 5]), n_hidden=8, n_out=5)),
        (ValueError, "compact_mlp: down must", lambda: compact_mlp(x, a, down, n_hidden=8, n_out=5)),
        (ValueError, "compact_mlp: down must", lambda: compact_mlp(x, a, b, n_hidden=8, n_out=99)),
        (ValueError, "compact_mlp: residual must",
         lambda: compact_mlp(x, a, b, n_hidden=8, n_out=5, residual=torch.zeros(3, 5))),
        (ValueError, "compact_mlp: gate_bias",
         lambda: compact_mlp(x, a, b, gate_bias=torch.zeros(8), n_hidden=8, n_out=5)),
        (TypeError, "compact_mlp: up", lambda: compact_mlp(x, a.double(), b, n_hidden=8, n_out=5)),
    ]  # fmt: skip
    exact = x.double() @ up.double().T
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
        assert torch.allclose(compact_linear(x, a, None, None, None, 8).double(), exact, atol=1e-5), message
