"""What a performance engineer looks with first: torch.profiler shows every op, FlopCounterMode counts every product."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

import prunekern as pk
from prunekern.nn import CompactLinear, CompactMLP
from prunekern.ops import (
    compact_attention,
    compact_linear,
    compact_mlp,
    dora_gain,
    dora_linear,
    dora_merge,
    rms_norm,
    rotate_pairs,
    row_sqnorm,
)
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.compact_linears import native
from tests.helpers.masked_dora import trained


def compact(family, share=0.3):
    tiny = tiny_decoders if family == "llama" else tiny_models
    model = tiny.build(family).eval()
    tiny_models.prune(tiny_models.attached(model), share)
    return pk.compact(model).eval(), tiny.batch(padded=False)


def rows(run):
    """{name: (how often, CPU microseconds in all, shapes of the last)} of prunekern's ops."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        run()
    found: dict = {}
    for event in seen.events():
        if event.name.startswith("prunekern::"):
            count, time, _ = found.get(event.name, (0, 0.0, None))
            found[event.name] = (count + 1, time + event.cpu_time_total, event.input_shapes)
    return found


@torch.no_grad()
def test_every_op_has_its_row():
    x, w = torch.randn(3, 8), torch.randn(6, 8)
    q, cos, angle = torch.randn(1, 3, 8), torch.randn(1, 3, 4), torch.arange(4)
    A, B, m = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)
    calls = {
        "compact_linear": lambda: compact_linear(x, w),
        "compact_mlp": lambda: torch.ops.prunekern.compact_mlp(
            x, w, w.T.contiguous(), None, None, None, None, None, None, None, None, None, 6, 8, "gelu", None
        ),
        "compact_attention": lambda: compact_attention(q, q, q, (0, 4, 8), (0, 4, 8)),
        "rms_norm": lambda: rms_norm(x, torch.ones(8), 1e-5),
        "rotate_pairs": lambda: rotate_pairs(q, cos, cos, angle, (0, 8)),
        "dora_gain": lambda: dora_gain(w, A, B, m, None, 2.0, row_sqnorm(w)),
        "dora_linear": lambda: dora_linear(x, w, A, B, m, None, 2.0),
        "dora_merge": lambda: dora_merge(w, A, B, m),
    }
    for name, call in calls.items():
        found = rows(call)
        mine = [row for row in found if row.removesuffix("_forward") == f"prunekern::{name}"]
        assert mine, (name, found)
        assert all(found[row][2] for row in mine), "no shapes"


@native
@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@torch.no_grad()
def test_a_compact_model_shows_its_ops_and_answers_alike(family):
    small, inputs = compact(family)
    want = small(**inputs)[0]
    answer = []
    found = rows(lambda: answer.append(small(**inputs)[0]))
    # Layer norms are PyTorch's while a profiler looks on: alike to their rounding.
    torch.testing.assert_close(answer[0], want, rtol=1e-5, atol=1e-5)
    layers = small.config.num_hidden_layers
    assert found["prunekern::compact_mlp"][0] == layers
    assert found["prunekern::compact_attention"][0] == layers
    assert found["prunekern::compact_linear"][0] >= 2 * layers  # q, k and v as one, and o
    assert found["prunekern::compact_linear"][2][0] and found["prunekern::compact_linear"][1] > 0
    if family == "llama":
        assert found["prunekern::rms_norm"][0] == 2 * layers + 1
        assert found["prunekern::rotate_pairs"][0] == 2 * layers
    assert not [e for e in seen_packing(small, inputs) if e]  # the packed weights of before were used


def seen_packing(small, inputs):
    packed = [m._packed for m in small.modules() if isinstance(m, CompactLinear)]
    rows(lambda: small(**inputs))
    return [a is not b for a, b in zip(packed, (m._packed for m in small.modules() if isinstance(m, CompactLinear)),
                                       strict=True)]  # fmt: skip


@native
@torch.no_grad()
def test_blocks_that_are_one_call_when_decoding_are_taken_apart():
    small, inputs = compact("llama")
    ids = inputs["input_ids"][:1, :4]
    want = small.generate(ids, max_new_tokens=4, do_sample=False)
    answer = []
    found = rows(lambda: answer.append(small.generate(ids, max_new_tokens=4, do_sample=False)))
    assert torch.equal(answer[0], want)
    blocks = 4 * small.config.num_hidden_layers  # of the prompt and of three tokens after it
    for op in ("compact_mlp", "compact_attention"):
        assert found[f"prunekern::{op}"][0] == blocks


@native
def test_a_packed_layer_shows_what_it_is_given():
    layer, x = CompactLinear(torch.randn(33, 17)).pack(), torch.randn(5, 17)
    found = rows(lambda: layer(x))
    count, _, shapes = found["prunekern::compact_linear"]
    assert count == 1 and shapes[0] == [5, 17] and len(shapes[1]) == 3  # panels: the plain weight was not read


def test_other_tools_stay_usable():
    layer, x = CompactLinear(torch.randn(33, 17)), torch.randn(5, 17)
    want = layer(x)
    with torch.autograd.profiler.profile() as seen:
        assert torch.equal(layer(x), want)
    assert any(e.name == "prunekern::compact_linear" for e in seen.function_events)
    if torch.profiler.itt.is_available():
        with torch.autograd.profiler.emit_itt():
            assert torch.equal(layer(x), want)
    timed = benchmark.Timer("layer(x)", globals={"layer": layer, "x": x}).timeit(10)
    assert timed.mean > 0
    assert rows(lambda: None) == {}


@native
def test_execution_traces(tmp_path):
    layer, x = CompactLinear(torch.randn(33, 17)).pack(), torch.randn(5, 17)
    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    with profile(activities=[ProfilerActivity.CPU], execution_trace_observer=observer):
        layer(x)
    assert "prunekern::compact_linear" in (tmp_path / "trace.json").read_text()


# --- FLOPs ------------------------------------------------------------------------------------------------------


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_of_every_op():
    x, up, down = torch.randn(2, 5, 8), torch.randn(6, 3), torch.randn(4, 6)
    inputs, outputs = torch.tensor([0, 2, 7]), torch.tensor([1, 2, 3, 8])
    rows_of_x = 10
    with torch.no_grad():
        assert counted(lambda: compact_linear(x, up, None, inputs)) == 2 * rows_of_x * 6 * 3
        layer = CompactLinear(up, None, inputs).pack()
        assert counted(lambda: layer(x)) == 2 * rows_of_x * 6 * 3
        mlp = CompactMLP(CompactLinear(up, None, inputs), CompactLinear(down, None, None, outputs, 9))
        mlp(x)
        assert counted(lambda: mlp(x)) == 2 * rows_of_x * (6 * 3 + 4 * 6)
        gated = CompactMLP(*(CompactLinear(w) for w in (torch.randn(6, 8), torch.randn(8, 6), torch.randn(6, 8))))
        gated(x)
        assert counted(lambda: gated(x)) == 2 * rows_of_x * 3 * 6 * 8
        direct = lambda: compact_mlp(x, torch.randn(6, 8), torch.randn(8, 6), n_hidden=6, n_out=8)  # noqa: E731
        assert counted(direct) == 2 * rows_of_x * 2 * 6 * 8
        q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 4), torch.randn(2, 7, 3)
        grouped = lambda: compact_attention(q, k, v, (0, 1, 4), (0, 2, 3), shared_by=2)  # noqa: E731
        assert counted(grouped) == 2 * 2 * 5 * 7 * 2 * (4 + 3)
        assert counted(lambda: rms_norm(x, torch.ones(8), 1e-5)) == 0
    V, A, B, m = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)
    assert counted(lambda: dora_gain(V, A, B, m, None, 1.0, row_sqnorm(V))) >= 2 * 6 * 8 * 2 + 2 * 2 * 8 * 2 + 2 * 6 * 4
    assert counted(lambda: dora_merge(V, A, B, m, torch.tensor([0, 3]), inputs)) == 2 * 2 * 3 * 2


@pytest.mark.parametrize("backward", [False, True])
def test_of_a_masked_layer(backward):
    layer, tokens = trained(masked=True).train(), 5
    N, K, r = layer.out_features, layer.in_features, layer.rank
    x = torch.randn(tokens, K, requires_grad=True)

    def run():
        y = layer(x).sum()
        if backward:
            y.backward()

    forward = 2 * tokens * (N * K + r * K + N * r)
    # dz V, dp A and dp; the gradients of A and B
    gradients = 2 * tokens * (N * K + r * K + N * r) + 2 * tokens * (r * K + N * r)
    assert counted(run) == forward + backward * gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@torch.no_grad()
def test_of_a_compact_model(family, packed):
    small, inputs = compact(family)
    tokens, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[1]
    if packed:
        small(**inputs)
    linears = sum(2 * tokens * m.weight.numel() for m in small.modules() if isinstance(m, CompactLinear))
    ragged = [m for m in small.modules() if isinstance(m, pk.nn.CompactAttention)]
    attention = sum(2 * tokens * length * m.shared_by * (m.qk_first[-1] + m.v_first[-1]) for m in ragged)
    heads = 0  # what is dense still
    for name, m in small.named_modules():
        if isinstance(m, torch.nn.Linear):
            many = len(inputs["input_ids"]) if "pooler" in name or "classifier" in name else tokens
            heads += 2 * many * m.weight.numel()
    other = counted(lambda: small(**inputs)) - linears - heads
    # Unpacked models run transformers' attention, on heads padded to the widest.
    rotary = 2 * tokens * small.model.rotary_emb.inv_freq.numel() if family == "llama" else 0
    assert other >= attention and (not packed or other <= attention + rotary)
    by_module = FlopCounterMode(display=False)
    with by_module:
        small(**inputs)
    name = next(n for n in by_module.get_flop_counts() if n.endswith(("ffn", "0.mlp", "intermediate.dense")))
    assert sum(by_module.get_flop_counts()[name].values()) > 0


def test_the_counter_is_told_whenever_it_is_imported():
    code = """
import sys, torch, {first}, {second}
import prunekern.nn as nn
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as c:
    nn.CompactLinear(torch.randn(6, 4))(torch.randn(3, 4))
assert c.get_total_flops() == 2 * 3 * 6 * 4, c.get_total_flops()
"""
    ours, theirs = "prunekern.ops", "torch.utils.flop_counter"
    for first, second in ((ours, theirs), (theirs, ours)):
        subprocess.run([sys.executable, "-c", code.format(first=first, second=second)], check=True, timeout=120)
    lazy = (
        "import sys, prunekern.nn; assert 'torch.utils.flop_counter' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", lazy], check=True, timeout=120)


def test_copies_are_counted_alike():
    layer, x = CompactLinear(torch.randn(6, 4)), torch.randn(3, 4)
    assert counted(lambda: copy.deepcopy(layer)(x)) == counted(lambda: layer(x)) == 2 * 3 * 6 * 4
