"""Compensated rounding: int4 holds what it makes exactly, and products lose less than by plain rounding."""

import pytest
import torch

from prunekern.compacting.compensating import compensated
from prunekern.ops.int4 import GROUP, dequantize_weight_int4, quantize_weight_int4


def held(weight):
    """As int4 holds it."""
    return dequantize_weight_int4(*quantize_weight_int4(weight), weight.shape[1])


def layer(n, k, rows=2000, seed=0):
    """weight [n, k], rows of inputs that go together and of which one is large, [rows, k]."""
    torch.manual_seed(seed)
    weight, mix = 0.05 * torch.randn(n, k), torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5
    x = torch.randn(rows, k) @ mix + torch.randn(rows, 1)
    x[:, k // 3] *= 20
    return weight, x


def lost(x, weight, near):
    """Noise over signal of the products, in float64."""
    right = x.double() @ weight.double().T
    return float((x.double() @ near.double().T - right).square().sum() / right.square().sum())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 31), (129, 372), (64, 577)])
def test_int4_holds_it_as_it_is(n, k):
    weight, x = layer(n, k)
    near = compensated(weight, x.T @ x)
    assert near.shape == weight.shape and near.dtype == torch.float32 and near.is_contiguous()
    assert torch.equal(held(near), near)


def test_groups_of_which_little_is_left_are_held_as_they_are():
    """Compensation may leave a group no large q, for which plain rounding would find another scale: groups of zeros,
    of one large weight that errors before it pull down, of tiny ones, of equal ones.
    """
    weight, x = layer(64, 96)
    weight[0], weight[1, :GROUP] = 0.0, 0.0
    weight[2, GROUP : 2 * GROUP] = torch.tensor([1.0] + [0.01] * 31)
    weight[3] *= 1e-2
    weight[4] = 0.3
    weight[5:40] = torch.randint(-2, 3, (35, 96)) * 0.01  # few values
    x = x + 5 * torch.randn(len(x), 1)  # all columns together: much is made good
    near = compensated(weight, x.T @ x)
    assert torch.equal(held(near), near)
    assert not near[0].any() and lost(x, weight[2:3], near[2:3]) < 0.02


def test_products_lose_less_than_plainly_rounded():
    """On rows that were not seen, too: correlated inputs leave room. 3 dB is half of what is found, 5.9."""
    weight, x = layer(128, 256, rows=6000)
    seen, other = x[:4000], x[4000:]
    near = compensated(weight, seen.T @ seen)
    for rows in (seen, other):
        assert lost(rows, weight, near) < 10**-0.3 * lost(rows, weight, held(weight))


def test_inputs_that_have_nothing_to_do_with_each_other_lose_no_more():
    """A diagonal Gram matrix: nothing can be made good, and scales are chosen by what counts, so that it is no worse
    than plain rounding, which chooses by all weights alike. The rest is the fit of the scale that plain rounding has:
    21.8 to 21.3 dB.
    """
    weight = torch.randn(200, 160, generator=torch.Generator().manual_seed(1))
    size = torch.rand(160, generator=torch.Generator().manual_seed(2)).add(0.1)
    near = compensated(weight, torch.diag(size.square()))
    error = [((z - weight) * size).square().sum() for z in (near, held(weight))]
    assert error[0] <= error[1]


def test_inputs_that_were_never_seen_are_rounded_all_the_same():
    weight, x = layer(32, 96)
    x[:, 40:50] = 0.0
    near = compensated(weight, x.T @ x)
    assert torch.equal(held(near), near) and near.isfinite().all()
    plain = (held(weight) - weight)[:, 40:50].square().mean()
    assert (near - weight)[:, 40:50].square().mean() < 2 * plain
    assert torch.equal(held(compensated(weight, torch.zeros(96, 96))), compensated(weight, torch.zeros(96, 96)))


def test_the_size_of_the_inputs_does_not_matter():
    """1e-15 times the Gram matrix is the same matrix to whoever rounds."""
    weight, x = layer(32, 96)
    gram = x.T @ x
    small, large = (compensated(weight, gram * by) for by in (2.0**-50, 2.0**20))
    assert (small != large).float().mean() < 0.01


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0)])
def test_nothing_left(n, k):
    assert compensated(torch.zeros(n, k), torch.zeros(k, k)).shape == (n, k)
