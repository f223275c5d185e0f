"""Rules of pruning from the literature that the learned masks are measured against, written from their papers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from prunekern.pruning.pruner import Pruner


class LoraGradient(TrainerCallback):
    """LoRAPrune (Zhang et al. 2023): a weight's importance from the gradients of its low-rank update alone.

    dL/dW is approximated by dB A + B dA - dB dA (their equation 7), a weight's importance is the square of that times
    the weight; a group's is the sum over its carrier's rows and what falls with them, averaged over steps with a
    momentum of 0.9. `scores` fills as training goes on.
    """

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self.scores = {c: np.zeros(g.count) for c, g in pruner.table.groups.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.pruner.finalized:
            return
        importance = {}
        for name, layer in self.pruner.layers.items():
            a, b, da, db = layer.A, layer.B, layer.A.grad, layer.B.grad
            gradient = db @ a + b @ da - db @ da
            importance[name] = (gradient * (layer.weight + layer.scale * b @ a)).square()
        for carrier, score in group_sums(self.pruner.table, importance).items():
            self.scores[carrier] *= 0.9
            self.scores[carrier] += 0.1 * score


def taylor(dense: nn.Module, table, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """LLM-Pruner (Ma et al. 2023), first order, by element: |weight x gradient| summed over a group's weights.

    table: of the model's family. The gradient is that of the loss summed over the batches, of the weights as they are
    before any training; `dense` comes back as it was.
    """
    linears = {n: m for n, m in dense.named_modules() if isinstance(m, nn.Linear) and n in table.layers}
    for linear in linears.values():
        linear.weight.requires_grad_(True).grad = None
    for batch in batches:
        dense(**batch).loss.backward()
    importance = {}
    for name, linear in linears.items():
        importance[name] = (linear.weight.detach() * linear.weight.grad).abs()
        linear.weight.grad = None
    return group_sums(table, importance)


def group_sums(table, importance: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Importance [N, K] of every linear's weights summed over each channel group, float64 [groups] by carrier."""
    scores = {}
    for carrier, group in table.groups.items():
        score = importance[carrier].sum(1)[group.rows].sum(1)
        for name, rows in group.removed_rows.items():
            score = score + importance[name].sum(1)[rows].sum(1)
        for name, cols in group.removed_cols.items():
            score = score + importance[name].sum(0)[cols].sum(1)
        scores[carrier] = score.double().numpy()
    return scores
