"""dora_merge against the definition in float64: the whole weight first, then the removal."""

import numpy as np
import pytest
import torch

from prunekern.ops import dora_linear, dora_merge
from prunekern.ops.dora_merge import dora_merge_reference

torch.set_num_threads(1)

SCALE = 1.75


def inputs(N, K, r, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    V, A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((N, K), (r, K), (N, r)))
    gain = torch.randn(N, generator=g, dtype=torch.float64)
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return [V.to(dtype), A.to(dtype), B.to(dtype), gain.to(full)]


def definition(V, A, B, gain, rows, cols, s=SCALE):
    """(W', the same from absolute values), float64."""
    V, A, B, gain = (t.double().numpy() for t in (V, A, B, gain))
    W = gain[:, None] * (V + s * B @ A)
    size = np.abs(gain)[:, None] * (np.abs(V) + s * np.abs(B) @ np.abs(A))
    pick = np.ix_(
        np.arange(V.shape[0]) if rows is None else rows.numpy(), np.arange(V.shape[1]) if cols is None else cols.numpy()
    )
    return torch.from_numpy(W[pick]), torch.from_numpy(size[pick])


def some(size, share, seed):
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share).nonzero().flatten()


@pytest.mark.parametrize("N,K,r", [(577, 372, 8), (1, 372, 1), (577, 1, 1), (1, 1, 1), (128, 65, 64)])
@pytest.mark.parametrize("keep", ["all", "rows", "cols", "both", "no rows", "no cols"])
def test_fp32_matches_definition(N, K, r, keep):
    V, A, B, gain = inputs(N, K, r)
    rows = some(N, 0.6, 1) if keep in ("rows", "both") else torch.arange(0) if keep == "no rows" else None
    cols = some(K, 0.4, 2) if keep in ("cols", "both") else torch.arange(0) if keep == "no cols" else None
    W = dora_merge(V, A, B, gain, rows, cols, SCALE)
    want, size = definition(V, A, B, gain, rows, cols)
    assert W.shape == want.shape and W.dtype == torch.float32 and W.is_contiguous()
    assert ((W - want).abs() <= (2 * r**0.5 + 4) * torch.finfo(torch.float32).eps * size).all()


def test_float64_matches_definition():
    V, A, B, gain = inputs(57, 37, 8, torch.float64)
    rows, cols = some(57, 0.5, 1), some(37, 0.5, 2)
    want, size = definition(V, A, B, gain, rows, cols)
    got = dora_merge(V, A, B, gain, rows, cols, SCALE)
    assert got.dtype == torch.float64 and ((got - want).abs() <= 1e-14 * size).all()
    torch.testing.assert_close(dora_merge_reference(V, A, B, gain, rows, cols, SCALE), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_computed_in_fp32(dtype):
    V, A, B, gain = inputs(57, 37, 8, dtype)
    rows = some(57, 0.5, 1)
    want, size = definition(V, A, B, gain, rows, None)
    got = dora_merge(V, A, B, gain, rows, None, SCALE)
    assert got.dtype == dtype
    # Half a unit in the last place of the one cast at the end.
    limit = 0.51 * torch.finfo(dtype).eps * want.abs() + 16 * torch.finfo(torch.float32).eps * size
    assert ((got.double() - want).abs() <= limit + torch.finfo(dtype).tiny).all()


def test_scale_defaults_to_one():
    V, A, B, gain = inputs(5, 7, 2, torch.float64)
    torch.testing.assert_close(dora_merge(V, A, B, gain), definition(V, A, B, gain, None, None, 1.0)[0])


def test_non_contiguous_inputs():
    V, A, B, gain = inputs(57, 37, 8)
    rows, cols = some(57, 0.5, 1), some(37, 0.5, 2)
    want = dora_merge(V, A, B, gain, rows, cols, SCALE)
    twice = torch.stack([rows, rows], 1)[:, 0]
    assert not twice.is_contiguous()
    got = dora_merge(
        V.T.contiguous().T, A.T.contiguous().T, B.T.contiguous().T, gain.flip(0).flip(0), twice, cols, SCALE
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_merged_weight_computes_what_the_layer_does():
    V, A, B, gain = inputs(57, 37, 8, torch.float64)
    x = torch.randn(5, 37, dtype=torch.float64)
    rows = some(57, 0.5, 1)
    y = dora_linear(x, V, A, B, gain, None, SCALE)[:, rows]
    torch.testing.assert_close(x @ dora_merge(V, A, B, gain, rows, None, SCALE).T, y, rtol=1e-12, atol=1e-12)


def test_opcheck():
    V, A, B, gain = inputs(9, 7, 2)
    op = torch.ops.prunekern.dora_merge.default
    torch.library.opcheck(op, (V, A, B, gain, torch.tensor([0, 4, 8]), torch.tensor([1, 2])), {"s": SCALE})
    torch.library.opcheck(op, (V, A, B, gain, None, None), {"s": SCALE})


def test_compile_fullgraph():
    V, A, B, gain = inputs(9, 7, 2)
    rows = torch.tensor([0, 4, 8])
    torch._dynamo.reset()
    compiled = torch.compile(dora_merge, fullgraph=True)
    torch.testing.assert_close(compiled(V, A, B, gain, rows, None, SCALE), dora_merge(V, A, B, gain, rows, None, SCALE))


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"rows": index(0, 2, 1)}, ValueError, r"rows must be sorted and < 6 \(got 1 at position 2\)"),
        ({"rows": index(0, 2, 2)}, ValueError, r"rows must be sorted and < 6 \(got 2 at position 2\)"),
        ({"rows": index(0, 6)}, ValueError, r"rows must be sorted and < 6 \(got 6 at position 1\)"),
        ({"rows": index(-1, 2)}, ValueError, r"rows must be sorted and < 6 \(got -1 at position 0\)"),
        ({"cols": index(3, 801)}, ValueError, r"cols must be sorted and < 10 \(got 801 at position 1\)"),
        ({"cols": index(3, 3)}, ValueError, r"cols must be sorted and < 10 \(got 3 at position 1\)"),
        ({"cols": index(9, 0)}, ValueError, r"cols must be sorted and < 10 \(got 0 at position 1\)"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, r"rows must be int64 \(got torch.int32\)"),
        ({"cols": torch.ones(10, dtype=torch.bool)}, TypeError, r"cols must be int64 \(got torch.bool\)"),
        ({"rows": index(0, 1)[None]}, ValueError, r"rows must be 1-D \(got shape \[1, 2\]\)"),
        ({"V": torch.zeros(6)}, ValueError, r"V must have shape \[\*, \*\] \(got \[6\]\)"),
        ({"A": torch.zeros(2, 6)}, ValueError, r"A must have shape \[2, 10\] \(got \[2, 6\]\)"),
        ({"A": torch.zeros(())}, ValueError, r"A must have shape \[\*, 10\] \(got \[\]\)"),
        ({"B": torch.zeros(2, 6)}, ValueError, r"B must have shape \[6, 2\] \(got \[2, 6\]\)"),
        ({"gain": torch.zeros(10)}, ValueError, r"gain must have shape \[6\] \(got \[10\]\)"),
        ({"gain": torch.zeros(6, dtype=torch.int64)}, TypeError, r"gain must be float64, .* \(got torch.int64\)"),
        ({"gain": torch.zeros(6, device="meta")}, ValueError, r"gain is on meta, V on cpu"),
        ({"rows": torch.arange(2, device="meta")}, ValueError, r"rows is on meta, V on cpu"),
    ],
)
def test_refusals(change, error, message):
    V, A, B, gain = inputs(6, 10, 2)
    args = {"V": V, "A": A, "B": B, "gain": gain, "rows": None, "cols": None} | change
    with pytest.raises(error, match="dora_merge: " + message):
        dora_merge(*args.values())


def test_a_backward_pass_is_refused():
    V, A, B, gain = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2), torch.rand(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="dora_merge: has no gradient"):
        dora_merge(V, A, B, gain).sum().backward()
