"""What bench.language.ablations puts beside the recipe: a least-squares fit at the boundary."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prunekern.pruning.pruner import Pruner

DAMPING = 0.01  # of the mean of the diagonal, towards what the weights are


@torch.no_grad()
def second_moments(pruner: Pruner, batches) -> dict[str, Tensor]:
    """X^T X of what every layer reads that loses columns, all channels on; fp32 [K, K] by layer name."""
    model, masks = pruner.model.eval(), pruner.masks
    sums = {}
    for group in pruner.table.groups.values():
        for name in group.removed_cols:
            width = pruner.layers[name].in_features
            sums[name] = torch.zeros(width, width)
    thresholds = {c: mask.threshold.clone() for c, mask in masks.items()}
    for mask in masks.values():
        mask.threshold.fill_(-math.inf)

    def adds_to(total: Tensor):
        def hook(module: nn.Module, args) -> None:
            x = args[0].flatten(0, -2)
            total.addmm_(x.T, x)

        return hook

    hooks = [pruner.layers[name].register_forward_pre_hook(adds_to(total)) for name, total in sums.items()]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for carrier, mask in masks.items():
        mask.threshold.copy_(thresholds[carrier])
    model.train()
    return sums


@torch.no_grad()
def least_squares(pruner: Pruner, moments: dict[str, Tensor]) -> float:
    """Once masks are final: kept columns of the layers that read pruned channels stand in for the others.

    W_S + (W_R M_RS) (M_SS + c I)^-1, with M the second moments, S the kept and R the removed columns; c I holds on to
    W_S. The frozen weight takes the change up, so that the adapter and its optimiser state stay as they are. Returns
    what is left of the squared error of leaving R out, mean over layers.
    """
    indices = pruner.table.indices({c: m.kept() for c, m in pruner.masks.items()})
    left = []
    for name, moment in moments.items():
        layer, kept = pruner.layers[name], indices[name][1]
        gone = torch.ones(layer.in_features, dtype=torch.bool)
        gone[kept] = False
        if not gone.any() or gone.all():
            continue
        weight, moment = layer.merged()[0].double(), moment.double()
        among = moment[kept][:, kept]
        among = among + DAMPING * among.diagonal().mean() * torch.eye(len(kept), dtype=among.dtype)
        missing = weight[:, gone] @ moment[gone][:, kept]
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = weight[:, kept] + torch.linalg.solve(among, missing.T).T
        before = torch.einsum("ij,jk,ik->", weight[:, gone], moment[gone][:, gone], weight[:, gone])
        rest = weight - fitted
        left.append(float(torch.einsum("ij,jk,ik->", rest, moment, rest) / before))
        # The layer computes gain (V + s B A): V takes what makes that the fitted weight.
        low_rank = layer.scale * (layer.B.double() @ layer.A.double())
        frozen = fitted / layer.gain(None).double()[:, None] - low_rank
        layer.weight.copy_(frozen)
        layer.refresh()
        layer.magnitude.copy_(fitted.norm(dim=1))
    return sum(left) / len(left)
