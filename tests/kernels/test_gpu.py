"""The same checks on a GPU, where there is one; and what only a GPU can tell."""

import pytest
import torch

from tests.helpers.kernel_checks import CHECKS, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    run(name)


def layer(dtype=torch.bfloat16):
    import prunekern as pk

    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(0))
    made = pk.nn.MaskedDoRALinear(weight.to(dtype), rank=8, mask=pk.nn.ChannelMask(256)).cuda()
    torch.nn.init.normal_(made.B, std=0.05)
    made.mask.logits.data.normal_()
    return made


def gradients(call, x, parameters):
    y = call(x)
    return y, torch.autograd.grad(y.float().square().sum(), [x, *parameters])


@pytest.mark.parametrize("how", ["compile", "checkpoint", "autocast", "graph"])
def test_pytorch_features_give_the_eager_answer(how):
    made = layer(torch.float32 if how == "autocast" else torch.bfloat16)
    x = torch.randn(512, 192, device="cuda", dtype=made.weight.dtype, requires_grad=True)
    parameters = [made.A, made.B, made.magnitude]
    if how == "autocast":
        with torch.autocast("cuda", torch.bfloat16):
            y, grads = gradients(made, x, parameters)
        assert y.dtype == torch.bfloat16
        want, want_grads = gradients(made, x, parameters)
        bound = 3e-2
    else:
        want, want_grads = gradients(made, x, parameters)
        bound = 1e-6
        if how == "compile":
            y, grads = gradients(torch.compile(made, fullgraph=True), x, parameters)
            bound = 1e-2  # another fusion rounds elsewhere
        elif how == "checkpoint":
            from torch.utils.checkpoint import checkpoint

            y, grads = gradients(lambda x: checkpoint(made, x, use_reentrant=False), x, parameters)
        else:
            static = x.detach().clone()
            made.refresh()
            with torch.no_grad():
                made(static)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = made(static)
            graph.replay()
            grads = want_grads
    for a, b in zip((y, *grads), (want, *want_grads), strict=True):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_gradients_are_bitwise_repeatable():
    made = layer()
    x = torch.randn(4096, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first, second = (gradients(made, x, [made.A, made.B, made.magnitude])[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gated_mlp_runs_as_one_op():
    from prunekern.nn import CompactLinear, CompactMLP

    up, gate, down = (CompactLinear(torch.randn(n, k) / k**0.5) for n, k in ((48, 64), (48, 64), (64, 48)))
    mlp = CompactMLP(up, down, gate, "silu").cuda().bfloat16()
    x = torch.randn(700, 64, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = mlp(x)
    assert "prunekern::compact_mlp" in {event.name for event in profile.events()}
    u, g = (x.double() @ layer.weight.double().T for layer in (mlp.up, mlp.gate))
    want = (torch.nn.functional.silu(g) * u) @ mlp.down.weight.double().T
    assert (y.double() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("rows", [5, 100, 600])  # gathered by the kernel; once; once and padded
def test_compact_linear_and_its_gradients_in_16_bits(rows):
    from prunekern import ops

    def random(*shape, seed):
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return made.cuda().bfloat16().requires_grad_()

    x, W, bias = random(rows, 90, seed=0), random(40, 70, seed=1), random(40, seed=2)
    into, out = torch.arange(10, 80, device="cuda"), torch.arange(0, 80, 2, device="cuda")
    y = ops.compact_linear(x, W, bias, into, out, 80, "gelu")
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (x, W, bias), dy))
    wide = [t.detach().double().requires_grad_() for t in (x, W, bias)]
    z = torch.nn.functional.gelu(wide[0][:, into] @ wide[1].T + wide[2])
    want = z.new_zeros(rows, 80).index_copy(1, out, z)
    want = (want, *torch.autograd.grad(want, wide, dy.double()))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16 and (a.double() - b).norm() <= 2e-2 * b.norm()


def test_more_than_two_to_the_31_elements():
    from prunekern import ops

    N, K = 32, 2**26 + 64
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs a GPU with 16 GiB")
    V = torch.zeros(N, K, device="cuda", dtype=torch.bfloat16)
    V[:, -1] = 2
    A, B, m = torch.zeros(1, K, device="cuda"), torch.ones(N, 1, device="cuda"), torch.ones(N, device="cuda")
    A[0, -1] = 1
    inv_norm = ops.dora_gain(V, A, B, m, None, 1.0, torch.full((N,), 4.0, device="cuda"))[1]
    torch.testing.assert_close(inv_norm, torch.full_like(inv_norm, 1 / 3))
