"""Products with few rows, either way round, against float64."""

import pytest
import torch

from prunekern.ops.thin import FEW, thin, thin_sums

torch.set_num_threads(1)


@pytest.mark.parametrize("r", [1, FEW, FEW + 1, 64])
@pytest.mark.parametrize("T,N", [(1, 577), (5, 1), (129, 372), (0, 7)])
@pytest.mark.parametrize("dtype,unit", [(torch.float32, 2**-24), (torch.float64, 2**-53)])
def test_against_float64(T, N, r, dtype, unit):
    g = torch.Generator().manual_seed(T)
    x, factor, p = (torch.randn(*s, generator=g, dtype=dtype) for s in ((T, N), (r, N), (T, r)))
    for found, a, b in (
        (thin(x, factor), x, factor.T),
        (thin(x, factor.T.contiguous().T), x, factor.T),  # as the gradient hands over B
        (thin_sums(x, p), x.T, p),
    ):
        wide, wide_b = a.double(), b.double()
        assert found.dtype == dtype and found.shape == (a.shape[0], b.shape[1])
        slack = 1 if dtype == torch.float32 else 2  # the sums of the comparison are rounded, too
        assert ((found - wide @ wide_b).abs() <= slack * (a.shape[1] + 1) * unit * (wide.abs() @ wide_b.abs())).all()
