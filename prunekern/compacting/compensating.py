"""int4 weights rounded so that what one input loses, the inputs after it make good.

Frantar et al., GPTQ (2022): columns are rounded one after another, and each one's error is taken from the columns that
are still to be rounded, by the inverse of the layer's Gram matrix. Here a group of 32 columns gets its scale when its
turn comes, from the weights as they then are: the one of several that loses least in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.int4 import GROUP, LEAST_STEPS, STEPS, round_groups

# Of a Gram matrix, added to every entry of its diagonal, as a share of it: inputs that go together in these texts do
# not always. By channel, not by their mean as in the paper: one channel is a hundred times as large as the rest. On
# texts that were not seen, 2,048 rows seen, a down projection of 1,281 inputs has 24.2 dB with 0.2, 23.1 with 0.01, and
# 22.1 plainly rounded.
DAMPING = 0.3
_LEAST = 1e-6  # of the mean, in each entry: inputs that were never seen


@torch.no_grad()
def compensated(weight: Tensor, gram: Tensor) -> Tensor:
    """The weight [N, K], float32, rounded: float32 numbers that `quantize_weight_int4` holds as they are.

    gram: [K, K], x^T x of the rows that the layer reads, on the same device. What is made small is the sum over these
    rows of |x W^T - x Q^T|^2. Groups are rounded in the order of how large their inputs are, and so are the inputs in
    each. Takes about 3 K^2 float64 numbers and 8 N K float32 ones while it runs.
    """
    n, k = weight.shape
    if not n or not k:
        return weight.clone()
    order, sizes = _order(gram.diagonal())
    upper = _upper(gram[order][:, order])
    left = weight.t()[order].contiguous()  # [K, N]: what is still to be rounded, errors of the rest taken off
    done = torch.empty_like(left)
    first = 0
    for size in sizes:
        here = slice(first, first + size)
        done[here], error = _round_group(left[here], upper[here, here])
        left[first + size :].addmm_(upper[here, first + size :].t(), error, alpha=-1.0)
        first += size
    found = torch.empty_like(done)
    found[order] = done
    return found.t().contiguous()


def _order(squares: Tensor) -> tuple[Tensor, list[int]]:
    """Columns in the order they are rounded in, int64 [K], and the sizes of the groups they come in: the one with the
    largest inputs first. squares: [K].
    """
    parts = squares.split(GROUP)
    groups = sorted(range(len(parts)), key=lambda g: -float(parts[g].sum()))
    columns = [parts[g].argsort(descending=True, stable=True) + g * GROUP for g in groups]
    return torch.cat(columns), [len(c) for c in columns]


def _upper(gram: Tensor) -> Tensor:
    """U [K, K] float32 with U^T U the inverse of the damped Gram matrix, U upper triangular."""
    damped = gram.double()
    diagonal = damped.diagonal()
    diagonal.add_(DAMPING * diagonal).add_(_LEAST * diagonal.mean() + 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def _round_group(group: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """group [k, N], a group's weights, and U's part [k, k] -> rounded weights [k, N], and errors [k, N] in the units
    that U passes on.

    Tried are scales for which the largest weight becomes so many steps, the one that plain rounding finds, and plain
    rounding itself, which `quantize_weight_int4` reproduces whatever it is. The others need a q of 6 and more.
    """
    k, n = group.shape
    plain, fitted = round_groups(group.t())  # [N, k], [N]
    largest = group.gather(0, group.abs().argmax(0, keepdim=True))  # [1, N]
    scales = torch.cat([*(largest / steps for steps in STEPS), fitted.float()[None], fitted.float()[None]])
    scales = scales.half().float()  # [tries, N]
    inverse = torch.where(scales != 0, 1.0 / scales, 0.0)
    left = group[:, None].repeat(1, len(scales), 1)  # [k, tries, N]
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for i in range(k):
        q = (left[i] * inverse).round_().clamp_(-8, 7)
        q[-1] = plain[:, i]
        codes[i] = q
        torch.sub(left[i], q * scales, out=errors[i]).div_(upper[i, i])
        left[i + 1 :].addcmul_(upper[i, i + 1 :, None, None], errors[i], value=-1.0)
    lost = errors.square().sum(0)  # [tries, N]
    fits = codes.abs().amax(0) >= LEAST_STEPS
    fits[-1] = True
    best = torch.where(fits, lost, torch.inf).argmin(0)  # [N]
    taken = best.expand(k, 1, n)
    q, error = codes.gather(1, taken)[:, 0], errors.gather(1, taken)[:, 0]
    return q * scales.gather(0, best[None]), error
