"""The Triton ops under fake tensors: shapes and dtypes of the reference, and graphs that see the kernels themselves."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed: its ops do not exist here")

from prunekern import kernels, ops

compact_linear_op = import_module("prunekern.ops.compact_linear").triton_op
compact_mlp_op = import_module("prunekern.ops.compact_mlp").triton_op

T, N, K, R = 300, 40, 24, 8


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors that the ops take for a GPU's (autograd crashes on fake CUDA tensors where there is no CUDA)."""
    monkeypatch.setattr(kernels, "usable", lambda *tensors, rank=1: True)
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype)


def traced(f, *shapes, dtype=torch.bfloat16) -> list[str]:
    """Names of the ops that torch.compile(fullgraph=True) hands to its backend for f, forward pass and backward."""
    names = []

    def keep(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        outputs = [None if n is None else n.meta["val"] for n in graph.graph.output_node().args[0]]
        return make_boxed_func(
            lambda *args: [None if o is None else torch.zeros(o.shape, dtype=o.dtype) for o in outputs]
        )

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    leaves = [torch.zeros(s, dtype=torch.float32 if len(s) == 1 else dtype, requires_grad=True) for s in shapes]
    out = compiled(*leaves)
    if out.requires_grad:
        out.sum().backward()  # the backward pass is compiled when it is first asked for
    return names


@pytest.fixture
def as_on_gpu(monkeypatch):
    """CPU tensors are taken for a GPU's, and Triton is told that there is one: which tensors a kernel writes to is read
    from its code as compiled for it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    monkeypatch.setattr(kernels, "usable", lambda *tensors, rank=1: True)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))


def launches(names: list[str]) -> int:
    return sum("triton_kernel_wrapper" in name for name in names)


def test_compiled_graphs_hold_the_kernels_themselves(as_on_gpu):
    V, A, B = torch.zeros(N, K), torch.zeros(R, K), torch.zeros(N, R)
    assert launches(traced(lambda m: ops.dora_gain(V, A, B, m, None, 0.5, m)[0], (N,), dtype=torch.float32)) == 1
    weight = V.bfloat16()
    for rows in (3, T):  # fused, compose
        names = traced(
            lambda x, a, b, g: ops.dora_linear(x, weight, a, b, g, None, 0.5).sum(), (rows, K), (R, K), (N, R), (N,)
        )
        assert launches(names) == 2, names  # forward, backward


def test_dora_gain(fake):
    V, A, B = fake(N, K), fake(R, K, dtype=torch.float32), fake(N, R, dtype=torch.float32)
    m, m_b = fake(N, dtype=torch.float32), fake(N, dtype=torch.float32)
    gain, inv_norm = ops.dora_gain(V, A, B, m, m_b, 0.5, m)
    assert gain.shape == inv_norm.shape == (N,) and gain.dtype == torch.float32


@pytest.mark.parametrize("rows", [3, T])
def test_dora_linear_forward_and_backward(fake, rows):
    x, V, A, B = fake(2, rows, K), fake(N, K), fake(R, K), fake(N, R)
    gain, bias = fake(N, dtype=torch.float32), fake(N, dtype=torch.float32)
    for t in (x, A, B, gain, bias):
        t.requires_grad_()
    y = ops.dora_linear(x, V, A, B, gain, bias, 0.5)
    assert y.shape == (2, rows, N) and y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), (x, A, B, gain, bias))
    for grad, t in zip(grads, (x, A, B, gain, bias), strict=True):
        assert grad.shape == t.shape and grad.dtype == t.dtype


def test_dora_merge_and_compact_ops(fake):
    compact_linear_op(), compact_mlp_op()  # registered
    V, A, B, gain = fake(N, K), fake(R, K), fake(N, R), fake(N, dtype=torch.float32)
    index = torch.empty(10, dtype=torch.int64)
    assert ops.dora_merge(V, A, B, gain, index, None, 0.5).shape == (10, K)
    x, residual = fake(2, 5, K), fake(2, 5, 2 * N)
    kept = torch.empty(N, dtype=torch.int64)
    y = torch.ops.prunekern.compact_linear_triton.default(
        x.view(10, K), V, gain, None, kept, 2 * N, "gelu", residual.view(10, 2 * N), None
    ).view(2, 5, 2 * N)
    assert y.shape == (2, 5, 2 * N) and y.dtype == torch.bfloat16
    hidden = torch.ops.prunekern.compact_gated_triton.default(x.view(10, K), V, V, None, gain, None, None, None, "silu")
    assert hidden.shape == (10, N) and hidden.dtype == torch.bfloat16
