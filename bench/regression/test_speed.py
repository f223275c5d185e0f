"""No kernel may lose more than 15 % against PyTorch: `make bench-check`, a minute.

Every case compares an op with what eager PyTorch does with the same kept channels (F.linear, two of them with GELU
between, SDPA on equal heads), in turn and in one process, and holds the ratio of the minima against baseline.json.
Layers that multiply in 8 or 16 bits where that is faster are compared with our own in fp32.
pytest-benchmark times our side and keeps its statistics (--benchmark-json); the ratio stands in their extra_info.
After a change that is meant: `make bench-baseline`, on a quiet machine, and commit the file.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from bench.regression import ratios
from prunekern.nn import CompactLinear
from prunekern.ops import (
    compact_attention,
    compact_linear,
    compact_mlp,
    disentangled_attention,
    pack_weight,
    quantize_weight,
)

SECONDS = 1.0  # each case, each attempt


def linear(m, n, k, kind="fp32"):
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    held, scale = weight, None
    if kind == "int8":
        held, scale = quantize_weight(weight)
    elif kind == "bf16":
        held = weight.bfloat16()
    packed = pack_weight(held)
    ours = lambda: compact_linear(x, packed, bias, None, None, n, "none", None, scale)  # noqa: E731
    return ours, lambda: F.linear(x, weight, bias)


def over_fp32(m, n, k, kind):
    """A layer that chooses the arithmetic of its weights against the same layer in fp32."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    ours, peer = (CompactLinear(weight, bias, weights=held, activations="auto").eval() for held in (kind, "fp32"))
    return (lambda: ours(x)), (lambda: peer(x))


def scattered(m, n, k, n_out):
    """The output projection: kept rows added into the residual."""
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    residual, kept, packed = torch.randn(m, n_out), torch.randperm(n_out)[:n].sort().values, pack_weight(weight)
    ours = lambda: compact_linear(x, packed, bias, None, kept, n_out, "none", residual)  # noqa: E731
    return ours, lambda: residual.index_add(-1, kept, F.linear(x, weight, bias))


def mlp(m, hidden, inner):
    x, residual = torch.randn(m, hidden), torch.randn(m, hidden)
    up, down = torch.randn(inner, hidden) / hidden**0.5, torch.randn(hidden, inner) / inner**0.5
    b1, b2 = torch.randn(inner), torch.randn(hidden)
    p1, p2 = pack_weight(up), pack_weight(down)
    ours = lambda: compact_mlp(  # noqa: E731
        x, p1, p2, up_bias=b1, down_bias=b2, n_hidden=inner, n_out=hidden, activation="gelu", residual=residual
    )
    return ours, lambda: residual + F.linear(F.gelu(F.linear(x, up, b1)), down, b2)


def attention(batch, tokens, heads, width):
    q, k, v = torch.randn(3, batch, tokens, heads * width)
    first = [head * width for head in range(heads + 1)]
    split = [part.view(batch, tokens, heads, width).transpose(1, 2) for part in (q, k, v)]
    ours = lambda: compact_attention(q, k, v, first, first, None, width**-0.5)  # noqa: E731
    peer = lambda: F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(q.shape)  # noqa: E731
    return ours, peer


def disentangled(batch, tokens, heads, width):
    q, k, v = torch.randn(3, batch, tokens, heads * width)
    key, query = torch.randn(2, 2 * tokens - 1, heads * width)
    first, scale = tuple(head * width for head in range(heads + 1)), (3 * width) ** -0.5
    by_head = [t.view(-1, t.shape[-2], heads, width).transpose(1, 2) for t in (q, k, v, key, query)]
    place = torch.arange(tokens)
    row = (place[:, None] - place + tokens - 1).expand(batch, heads, -1, -1)

    def peer():
        q, k, v, key, query = by_head
        logits = q @ k.transpose(-1, -2) + (q @ key.transpose(-1, -2)).gather(-1, row)
        by_key = (k @ query.transpose(-1, -2)).gather(-1, row.transpose(-1, -2))
        weights = (scale * (logits + by_key.transpose(-1, -2))).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)

    return lambda: disentangled_attention(q, k, v, first, first, key, query, None, scale), peer


NARROW = {
    f"{kind} layer over fp32 {m}x3072x768": (over_fp32, m, 3072, 768, kind)
    for kind in ("bf16", "int8")
    for m in (1, 16, 128)
}
# What a case is held to for as long as baseline.json has nothing of it: fewer bits are never slower, and neither is
# what gathers nothing.
DISENTANGLED = {"disentangled 1x128x12x48": (disentangled, 1, 128, 12, 48)}
FLOOR = dict.fromkeys((*NARROW, *DISENTANGLED), 1.0)
CASES = {
    # One row: not 577 x 768, whose 1.7 MB may or may not stay in L2 (0.73 or 0.93 of F.linear, by process).
    **{f"linear 1x{n}x{k}": (linear, 1, n, k) for n, k in ((768, 768), (2319, 768), (4096, 4096))},
    **{f"linear {m}x{n}x768": (linear, m, n, 768) for m in (16, 128) for n in (768, 2319, 577)},
    "linear 128x768x2319": (linear, 128, 768, 2319),
    **{f"{kind} {m}x3072x768": (linear, m, 3072, 768, kind) for m in (1, 16) for kind in ("bf16", "int8")},
    **NARROW,
    "scattered 16x577x768": (scattered, 16, 577, 768, 768),
    "scattered 128x577x2319": (scattered, 128, 577, 2319, 768),
    "mlp 1x768x2319": (mlp, 1, 768, 2319),
    "mlp 128x768x2319": (mlp, 128, 768, 2319),
    "attention 1x128x12x48": (attention, 1, 128, 12, 48),
    "attention 1x512x12x64": (attention, 1, 512, 12, 64),
    **DISENTANGLED,
}
# Largest relative error (of the norms) by kind of weight; bf16 keeps 8 bits, int8 7.
TOLERANCE = {"bf16": 5e-3, "int8": 2e-2}


@pytest.mark.parametrize("case", CASES)
def test_ratio(case, expected, benchmark):
    torch.manual_seed(0)
    build, *sizes = CASES[case]
    ours, peer = build(*sizes)
    assert (ours() - peer()).norm() <= TOLERANCE.get(case.split()[0], 1e-5) * peer().norm()
    measure = lambda: ratios.measure(ours, peer, SECONDS)  # noqa: E731
    ratio = measure()
    if expected.known is None:  # one of four runs once had a case 18 % off
        ratio = statistics.median([ratio, measure(), measure()])
    else:
        wanted = expected.known.get(case, FLOOR.get(case))
        assert wanted is not None, f"{case}: not in baseline.json; write it with make bench-baseline"
        ratio = ratios.confirmed(ratio, measure, wanted)
    benchmark.extra_info["ratio"] = expected.measured[case] = ratio
    benchmark.pedantic(ours, rounds=10, warmup_rounds=1)
    if expected.known is not None:
        assert not ratios.has_fallen(ratio, wanted), (
            f"{case}: {ratio:.2f} x its peer, {1 - ratio / wanted:.0%} below the baseline of {wanted:.2f}"
        )
