"""Channels picked and placed: values and gradients against indexing, odd shapes, strided inputs."""

import pytest
import torch

from prunekern.nn import pick_channels, place_channels


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (1, 1, 5)])
@pytest.mark.parametrize("index", [[], [2], [0, 4], [4, 1, 3], [0, 1, 2, 3, 4]])
def test_values_and_gradients(shape, index):
    index = torch.tensor(index, dtype=torch.int64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*shape[:-1], len(index), dtype=torch.float64, requires_grad=True)
    assert torch.equal(pick_channels(x, index), x[..., index])
    want = torch.zeros(shape, dtype=torch.float64)
    want[..., index] = y.detach()
    assert torch.equal(place_channels(y, index, 5), want)
    assert torch.autograd.gradcheck(lambda t: pick_channels(t, index), x)
    assert torch.autograd.gradcheck(lambda t: place_channels(t, index, 5), y)


def test_strided_input():
    x = torch.randn(4, 6, 5).transpose(0, 1)[:, ::2]
    index = torch.tensor([1, 3])
    assert torch.equal(pick_channels(x, index), x[..., index])
    assert torch.equal(place_channels(x, torch.tensor([0, 2, 3, 5, 6]), 8)[..., [0, 2, 3, 5, 6]], x)
