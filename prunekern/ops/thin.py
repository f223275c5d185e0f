"""Products with a matrix of few rows, the low-rank factors of DoRA: which way round they are handed to the vendor."""

from __future__ import annotations

from torch import Tensor

FEW = 8  # ranks of LoRA begin here; from 16 on, the plain way is as fast


def thin(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T. x: [T, K], factor: [r, K], of one dtype -> [T, r], maybe not contiguous.

    With few rows on a CPU as (factor x^T)^T: PyTorch is faster at T columns of r rows than at r columns of T, most of
    all where the factor lies the other way (a transposed [K, r]).
    """
    if x.is_cpu and factor.shape[0] <= FEW:
        return (factor @ x.T).T
    return x @ factor.T


def thin_sums(y: Tensor, p: Tensor) -> Tensor:
    """y^T p, summed over tokens. y: [T, N], p: [T, r] -> [N, r], maybe not contiguous.

    On a CPU as (p^T y)^T, for the same reason: N columns in place of r. What the products are to a training step,
    `python -m bench.cpu.train_step` says.
    """
    return (p.T @ y).T if y.is_cpu else y.T @ p
