"""What the ablations put in place of parts of the product: other noise, another budget, teachers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunekern.nn import ChannelMask
from prunekern.pruning import budget
from prunekern.pruning.pruner import Pruner
from prunekern.pruning.saliency import Saliency, group_cost, starting_logits


class HardConcrete(ChannelMask):
    """Louizos et al. 2018: values in [0, 1], stretched to (-0.1, 1.1) and clamped, without straight-through."""

    LOW, HIGH, BETA = -0.1, 1.1, 2 / 3

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.training or self.is_open or bool(self.final):
            return super().forward(dtype)
        soft = torch.sigmoid((self.logits - self.threshold + self.noise) / self.BETA)
        groups = (soft * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1).to(dtype)
        return groups if self.row_group is None else groups.index_select(0, self.row_group)


class SharedScale(torch.optim.Optimizer):
    """Adam with one second moment for all logits: a step is as large as its group's gradient is among them."""

    def __init__(self, logits: list, lr: float):
        super().__init__(logits, {"lr": lr})
        self.steps, self.second, self.first = 0, 0.0, [torch.zeros_like(p) for p in logits]

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        group = self.param_groups[0]
        gradients = [p.grad for p in group["params"]]
        mean = torch.cat(gradients).square().mean().item()
        self.second = 0.99 * self.second + 0.01 * mean
        scale = (self.second / (1 - 0.99**self.steps)) ** 0.5 * (1 - 0.9**self.steps)
        for p, gradient, first in zip(group["params"], gradients, self.first, strict=True):
            first.lerp_(gradient, 0.1)
            p -= group["lr"] / max(scale, 1e-30) * first


class Lagrangian:
    """(l1 + l2 d) d with d the scheduled minus the expected share; multipliers ascend (Wang et al. 2020)."""

    def __init__(self, pruner: Pruner, rate: float = 0.1):
        self.pruner, self.rate, self.first, self.second, self.gap = pruner, rate, 0.0, 0.0, 0.0

    def penalty(self) -> Tensor:
        """Expected share from logits alone: the threshold stays at zero. Its gradient is by finite differences of the
        cost, exact as the cost is linear in each layer's count.
        """
        pruner, kept, share = self.pruner, {}, 0.0
        for carrier, mask in pruner.masks.items():
            kept[carrier] = budget.sigmoid(mask.logits.detach().double().numpy())
        cost, dense = pruner.table.cost(kept, pruner.config.cost), budget.dense_cost(pruner.table, pruner.config.cost)
        for carrier, mask in pruner.masks.items():
            less = {**kept, carrier: kept[carrier] * (1 - 1e-4)}  # not more: probabilities near 1 would pass it
            slope = (cost - pruner.table.cost(less, pruner.config.cost)) / (1e-4 * kept[carrier].sum())
            probability = torch.sigmoid(mask.logits)
            share = share - (probability - probability.detach()).sum() * (slope / dense)
        self.gap = pruner.target() - (1 - cost / dense)
        gap = self.gap - share
        return self.first * gap + self.second * gap**2

    def ascend(self) -> None:
        if not self.pruner.warm:
            self.first += self.rate * self.gap * 100
            self.second += self.rate * self.gap**2 * 1000
            for mask in self.pruner.masks.values():
                mask.threshold.zero_()


class OfSteps(Saliency):
    """Saliency from the square of a whole step's mask gradient, in place of those of its tokens."""

    @torch.no_grad()
    def observe(self) -> None:
        squares = {c: mask.logits.grad.square() for c, mask in self.masks.items()}
        mean = torch.cat(list(squares.values())).mean()
        for carrier, mask in self.masks.items():
            mask.saliency += squares[carrier] / mean


class OfSamples(Saliency):
    """Saliency from the squares of the mask gradients of every sample. layers: the carriers, by name."""

    def __init__(self, masks: Mapping[str, ChannelMask], layers: Mapping[str, nn.Module]):
        super().__init__(masks)
        self.fresh: dict[str, Tensor] = {}
        self.hooks = [layers[c].register_forward_hook(self._hook(c)) for c in masks]

    def _hook(self, carrier: str):
        mask = self.masks[carrier]

        def backward(y: Tensor, gradient: Tensor) -> None:
            by_row = (gradient * y).flatten(1, -2).sum(1)  # [batch, N]: dL/dm_b of each sample, as m_b is 1
            group = mask.row_group
            if group is not None:
                by_row = by_row.new_zeros(len(by_row), mask.logits.numel()).index_add_(1, group, by_row)
            self.fresh[carrier] = by_row.square().sum(0)

        def forward(module, args, y: Tensor) -> None:
            if y.requires_grad and mask.is_open:
                values = y.detach()
                y.register_hook(lambda g: backward(values, g))

        return forward

    @torch.no_grad()
    def observe(self) -> None:
        mean = torch.cat(list(self.fresh.values())).mean()
        for carrier, mask in self.masks.items():
            mask.saliency += self.fresh[carrier] / mean

    def close(self) -> None:
        super().close()
        for hook in self.hooks:
            hook.remove()


class Regathered:
    """Saliency goes on after the warm steps, as a moving average; the logits start anew from it at every step, with
    what the optimiser has moved them by on top.
    """

    def __init__(self, pruner: Pruner, decay: float, learn: bool):
        self.pruner, self.decay, self.learn = pruner, decay, learn
        self.mean: dict[str, np.ndarray] | None = None
        self.start: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self) -> None:
        """Before the logits' optimiser steps."""
        masks, fresh = self.pruner.masks, {}
        for carrier, mask in masks.items():
            soft = torch.sigmoid((mask.logits - mask.threshold + mask.noise) / mask.temperature)
            slope = (soft * (1 - soft) / mask.temperature).clamp_min(1e-6)
            fresh[carrier] = (mask.logits.grad / slope).double().square().numpy()
        if self.mean is None:
            self.mean = {c: m.saliency.double().numpy() for c, m in masks.items()}
            total = np.concatenate(list(self.mean.values())).mean()
            self.mean = {c: s / total for c, s in self.mean.items()}
        mean = np.concatenate(list(fresh.values())).mean()
        if mean == 0:  # no mask closes at the first step of the ramp: none has a gradient
            return
        for carrier, now in fresh.items():
            self.mean[carrier] = self.decay * self.mean[carrier] + (1 - self.decay) * now / mean

    @torch.no_grad()
    def restart(self) -> None:
        """After it."""
        pruner = self.pruner
        start = starting_logits(pruner.table, self.mean, pruner.config.cost, pruner.config.spread)
        for carrier, mask in pruner.masks.items():
            now = torch.from_numpy(start[carrier]).float()
            if self.learn:
                mask.logits += now - self.start.get(carrier, now)
            else:
                mask.logits.copy_(now)
            self.start[carrier] = now


class Teacher:
    """Logits (temperature 2) and hidden states of the model with all masks on."""

    def __init__(self, pruner: Pruner, variant):
        self.pruner, self.variant, self.frozen = pruner, variant, None

    @torch.no_grad()
    def teach(self, batch: dict):
        hidden = self.variant.distil_hidden > 0
        if self.variant.teacher == "warm":
            if self.frozen is None:
                self.frozen = copy.deepcopy(self.pruner.model).eval()
                for module in self.frozen.modules():
                    if isinstance(module, ChannelMask):
                        module.threshold.fill_(-math.inf)
            return self.frozen(**batch, output_hidden_states=hidden)
        own = self.pruner.model.eval()
        thresholds = [mask.threshold.clone() for mask in self.pruner.masks.values()]
        for mask in self.pruner.masks.values():
            mask.threshold.fill_(-math.inf)
        out = own(**batch, output_hidden_states=hidden)
        for mask, threshold in zip(self.pruner.masks.values(), thresholds, strict=True):
            mask.threshold.copy_(threshold)
        own.train()
        return out

    def loss(self, out, batch: dict) -> Tensor:
        wanted, v, loss = self.teach(batch), self.variant, 0.0
        if v.distil_logits:
            soft = F.log_softmax(out.logits / 2, -1), F.softmax(wanted.logits / 2, -1)
            loss = loss + 4 * v.distil_logits * F.kl_div(*soft, reduction="batchmean")
        if v.distil_hidden:
            real = batch["attention_mask"].bool()
            for a, b in zip(out.hidden_states[1:], wanted.hidden_states[1:], strict=True):
                part = (a[real] - b[real]).square().mean() / b[real].square().mean()
                loss = loss + v.distil_hidden * part / (len(wanted.hidden_states) - 1)
        return loss


class Averaged:
    """The mean of everything trained over the steps observed."""

    def __init__(self, pruner: Pruner):
        self.model, self.count, self.sums = pruner.model, 0, {}

    @torch.no_grad()
    def observe(self) -> None:
        self.count += 1
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                if name not in self.sums:
                    self.sums[name] = torch.zeros_like(p)
                self.sums[name] += p

    @torch.no_grad()
    def take(self) -> None:
        for name, p in self.model.named_parameters():
            if name in self.sums:
                p.copy_(self.sums[name] / self.count)


class Means:
    """A channel that is off stands at its mean over tokens for the linears that read it: theirs is the bias that says
    so. (Bias compensation is An et al. 2024's, FLAP, for masks that are chosen once.)
    """

    BATCHES, SIZE = 12, 32

    def __init__(self, pruner: Pruner):
        self.pruner, self.means, self.bias = pruner, {}, {}
        self.readers = {n: (c, cols) for c, g in pruner.table.groups.items() for n, cols in g.removed_cols.items()}
        assert all(pruner.layers[n].bias is not None for n in self.readers)

    @torch.no_grad()
    def gather(self, rows, collate, seed: int) -> None:
        """Means of what the linears read, all channels on, padding left out."""
        model = self.pruner.model.eval()
        seen, real = {n: [] for n in self.readers}, [None]
        hooks = [
            self.pruner.layers[n].register_forward_pre_hook(lambda m, args, n=n: seen[n].append(args[0][real[0]]))
            for n in self.readers
        ]
        order = np.random.default_rng(seed).permutation(len(rows))[: self.BATCHES * self.SIZE]
        for i in range(0, len(order), self.SIZE):
            batch = collate([rows[int(j)] for j in order[i : i + self.SIZE]])
            real[0] = batch["attention_mask"].bool()
            model(**batch)
        for hook in hooks:
            hook.remove()
        self.means = {n: torch.cat(found).mean(0) for n, found in seen.items()}
        self.bias = {n: self.pruner.layers[n].bias.detach().clone() for n in self.readers}
        model.train()

    @torch.no_grad()
    def fold(self) -> None:
        """After every draw, and once the masks are final."""
        masks = self.pruner.masks
        for name, (carrier, cols) in self.readers.items():
            mask = masks[carrier]
            noise = 0.0 if self.pruner.finalized else mask.noise
            off = cols[mask.logits - mask.threshold + noise <= 0].flatten()
            weight, _ = self.pruner.layers[name].merged()
            self.pruner.layers[name].bias.copy_(self.bias[name] + weight[:, off] @ self.means[name][off])


@torch.no_grad()
def sliced_by(pruner: Pruner) -> None:
    """Logits from saliency over the mean of its layer and kind, whatever a group costs."""
    saliency = {c: m.saliency.double().numpy() for c, m in pruner.masks.items()}
    by_layer = {c: s / s.mean() for c, s in saliency.items()}
    # starting_logits divides by cost: multiply with it first.
    scaled = {c: s * group_cost(pruner.table, c, pruner.config.cost) for c, s in by_layer.items()}
    for carrier, values in starting_logits(pruner.table, scaled, pruner.config.cost, pruner.config.spread).items():
        pruner.masks[carrier].logits.copy_(torch.from_numpy(values))


@torch.no_grad()
def shuffled_inside(pruner: Pruner, seed: int) -> None:
    """The same logits in each mask, in another order: the allocation stays, the choice is random."""
    rng = np.random.default_rng(seed)
    for mask in pruner.masks.values():
        mask.logits.copy_(mask.logits[torch.from_numpy(rng.permutation(mask.logits.numel()))])
