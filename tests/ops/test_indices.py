"""Bad indices, eps and scale are refused whatever the sizes: without rows, without outputs, without inputs."""

from __future__ import annotations

import pytest
import torch

from prunekern.ops import (
    compact_attention,
    compact_linear,
    compact_mlp,
    dora_merge,
    pack_weight,
    quantize_weight,
    rms_norm,
    rotate_pairs,
)
from tests.helpers.compact_linears import native

BAD = {
    "unsorted": torch.tensor([2, 1, 3, 7]),
    "twice": torch.tensor([1, 1, 3, 7]),
    "negative": torch.tensor([-1, 1, 3, 7]),
    "beyond": torch.tensor([0, 1, 3, 8]),
}
NOTHING = torch.zeros(0, dtype=torch.int64)


def held(weight, how):
    """(weight, scale) plain, packed or packed int8."""
    if how == "int8":
        q, scale = quantize_weight(weight)
        return pack_weight(q), scale
    return (pack_weight(weight) if how == "packed" else weight), None


@native
@pytest.mark.parametrize("how", ["plain", "packed", "int8"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("bad", BAD)
def test_of_linear_and_mlp(bad, rows, how):
    index, x = BAD[bad], torch.randn(rows, 8)
    w, scale = held(torch.randn(6, 4), how)
    with pytest.raises(ValueError, match="in_index must be sorted and < 8"):
        compact_linear(x, w, None, index, None, 6, "none", None, scale)
    w, scale = held(torch.randn(4, 8), how)
    with pytest.raises(ValueError, match="out_index must be sorted and < 8"):
        compact_linear(x, w, None, None, index, 8, "none", None, scale)
    (up, up_scale), (down, down_scale) = held(torch.randn(5, 4), how), held(torch.randn(4, 5), how)
    scales = {"up_scale": up_scale, "down_scale": down_scale}
    with pytest.raises(ValueError, match="in_index must be sorted and < 8"):
        compact_mlp(x, up, down, in_index=index, n_hidden=5, n_out=4, **scales)
    up, up_scale = held(torch.randn(5, 8), how)
    with pytest.raises(ValueError, match="out_index must be sorted and < 8"):
        compact_mlp(x, up, down, out_index=index, n_hidden=5, n_out=8, up_scale=up_scale, down_scale=down_scale)


@native
@pytest.mark.parametrize("how", ["plain", "packed"])
@pytest.mark.parametrize("bad", BAD)
def test_without_outputs_or_inputs(bad, how):
    index, x = BAD[bad], torch.randn(3, 8)
    nothing, _ = held(torch.randn(0, 4), how)
    for out_index, n_out in ((None, 0), (NOTHING, 8)):
        with pytest.raises(ValueError, match="in_index must be sorted and < 8"):
            compact_linear(x, nothing, None, index, out_index, n_out)
    w, _ = held(torch.randn(4, 0), how)
    with pytest.raises(ValueError, match="out_index must be sorted and < 8"):
        compact_linear(torch.randn(3, 0), w, None, None, index, 8)


@pytest.mark.parametrize("bad", BAD)
def test_of_merging_and_rotary(bad):
    V, A, B, gain = torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), torch.randn(5)
    with pytest.raises(ValueError, match="cols must be sorted"):
        dora_merge(V, A, B, gain, NOTHING, BAD[bad])
    with pytest.raises(ValueError, match="cols must be sorted"):
        dora_merge(V[:0], A, B[:0], gain[:0], None, BAD[bad])
    angles = torch.tensor([0, 1, 3, 2]) if bad in ("unsorted", "twice") else BAD[bad]  # angles may come in any order
    for batch, tokens in ((1, 0), (0, 2)):
        with pytest.raises(ValueError, match="angle must be in 0..2"):
            rotate_pairs(
                torch.randn(batch, tokens, 8), torch.randn(1, tokens, 3), torch.randn(1, tokens, 3), angles, (0, 8)
            )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [0, 3])
def test_numbers_that_are_none(value, rows):
    x = torch.randn(rows, 8)
    with pytest.raises(ValueError, match="eps must be finite"):
        rms_norm(x, torch.ones(8), value)
    q = torch.randn(1, rows, 8)
    with pytest.raises(ValueError, match="scale must be finite"):
        compact_attention(q, q, q, (0, 8), (0, 8), None, value)


def test_a_negative_eps():
    with pytest.raises(ValueError, match="eps must be finite and not negative"):
        rms_norm(torch.randn(3, 8), torch.ones(8), -1e-5)
