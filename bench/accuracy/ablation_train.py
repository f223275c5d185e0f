"""The plain training loop of bench.accuracy.ablations, with what a variant changes."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

import prunekern as pk
from bench.accuracy.ablation_parts import (
    Averaged,
    HardConcrete,
    Lagrangian,
    Means,
    OfSamples,
    OfSteps,
    Regathered,
    SharedScale,
    Teacher,
    shuffled_inside,
    sliced_by,
)
from bench.accuracy.ablation_variants import Variant

MEGA = 50
# What shapes the steps before masks begin to close.
SHAPES_WARM = ("task", "steps", "batch", "lr", "second_rate", "warmup", "warm", "biases", "saliency")


def batches_of(rows, size: int, seed: int):
    """Batches of rows of like length for ever, as lists of indices: shuffled, sorted within MEGA batches, shuffled."""
    rng = np.random.default_rng(seed)
    lengths = np.array(rows["length"])
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), size * MEGA):
            part = order[start : start + size * MEGA]
            part = part[np.argsort(lengths[part], kind="stable")]
            cuts = [part[i : i + size] for i in range(0, len(part), size)]
            for i in rng.permutation(len(cuts)):
                if len(cuts[i]) == size:
                    yield [int(j) for j in cuts[i]]


def rate(v: Variant, step: int) -> float:
    if v.second_rate is not None:
        return v.lr if step < v.stage_one else v.second_rate
    if v.again is not None and step >= v.stage_one:
        return v.lr * v.again * (v.steps - step) / (v.steps - v.stage_one)
    return v.lr * min(1.0, (step + 1) / (v.warmup + 1)) * (1 - step / v.steps)


def mask_optimizer_of(v: Variant, logits: list) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD, "shared scale": SharedScale}[v.mask_optimizer]
    return kind(logits, v.mask_lr)


class WarmStates:
    """Training as it stood one step before the masks begin to close; variants that differ later only start from it.

    Holds what is trained, the optimiser's moments, the gathered saliency and the random state: the run that starts
    from it is, bit for bit, the one that takes the warm steps itself.
    """

    def __init__(self):
        self.states: dict[tuple, dict] = {}

    @staticmethod
    def _key(v: Variant, seed: int) -> tuple:
        return (seed, *(getattr(v, name) for name in SHAPES_WARM))

    def take(self, v: Variant, seed: int, pruner, optimizer) -> None:
        parts = {n: p.detach().clone() for n, p in pruner.model.named_parameters() if p.requires_grad}
        parts |= {n: b.clone() for n, b in pruner.model.named_buffers() if n.endswith((".saliency", ".threshold"))}
        moments = {
            k: {n: t.clone() for n, t in own.items()} for k, own in optimizer.state_dict()["state"].items()
        }  # fmt: skip
        self.states[self._key(v, seed)] = {
            "parts": parts, "moments": moments, "pruner": pruner.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip

    def give(self, v: Variant, seed: int, pruner, optimizer) -> int:
        """Steps that need not be taken."""
        state = self.states.get(self._key(v, seed))
        if state is None or not pruner.warm:
            return 0
        pruner.model.load_state_dict(state["parts"], strict=False)
        moments = {k: {n: t.clone() for n, t in own.items()} for k, own in state["moments"].items()}
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        pruner.load_state_dict({**state["pruner"], "ramp_steps": v.ramp})
        torch.set_rng_state(state["random"])
        return pruner.steps


def train(v: Variant, seed: int, dense, rows, collate, warm_states: WarmStates | None = None):
    """(pruner with final masks, what the report wants of the way there)."""
    config = pk.PruneConfig(
        sparsity=v.share, seed=seed, warm_steps=0 if v.start == "flat" else v.warm, ramp_steps=v.ramp, spread=v.spread,
        temperature=v.temperature,
    )  # fmt: skip
    pruner = pk.attach(dense, config)
    if v.rule is not None:
        pruner.finalize("uniform", v.rule)
    masks = pruner.masks
    if v.noise == "hard concrete":
        for mask in masks.values():
            mask.__class__ = HardConcrete
    if v.biases:
        for layer in pruner.layers.values():
            layer.bias.requires_grad_(True)
    groups = pruner.param_groups(v.lr, v.mask_lr)
    optimizer = torch.optim.AdamW(groups[:1], weight_decay=0.0)
    mask_optimizer = mask_optimizer_of(v, [mask.logits for mask in masks.values()])
    budget = Lagrangian(pruner) if v.budget == "lagrangian" else None
    teacher = Teacher(pruner, v) if v.distil_logits or v.distil_hidden else None
    again = Regathered(pruner, v.regather, v.learn) if v.regather else None
    if pruner.warm and v.saliency != "tokens":
        pruner.gather_with({"steps": OfSteps, "samples": partial(OfSamples, layers=pruner.layers)}[v.saliency])
    average, means = Averaged(pruner) if v.average else None, Means(pruner) if v.means else None
    flips = []
    done = warm_states.give(v, seed, pruner, optimizer) if warm_states is not None else 0
    model = pruner.model.train()
    for step, batch in zip(range(v.steps), batches_of(rows, v.batch, seed), strict=False):
        if step < done:
            continue
        batch = collate([rows[i] for i in batch])
        optimizer.param_groups[0]["lr"] = rate(v, step)
        out = model(**batch, output_hidden_states=v.distil_hidden > 0)
        loss = out.loss
        if teacher is not None and not pruner.warm:
            loss = loss + teacher.loss(out, batch)
        if budget is not None and not pruner.finalized and not pruner.warm:
            loss = loss + budget.penalty()
        optimizer.zero_grad()
        mask_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
        optimizer.step()
        if not (pruner.warm or pruner.finalized):
            if again is not None:
                again.observe()
            if v.learn:
                mask_optimizer.step()
            if again is not None:
                again.restart()
        was_warm = pruner.warm
        if means is not None and was_warm and pruner.steps == v.warm - 1:
            means.gather(rows, collate, seed)
        pruner.step()
        if pruner.warm and pruner.steps == v.warm - 1 and warm_states is not None:
            warm_states.take(v, seed, pruner, optimizer)
        if was_warm and not pruner.warm:
            if v.balanced:
                pruner.finalize("uniform", "saliency")
            elif v.by == "kind":
                sliced_by(pruner)
        if average is not None and step >= v.steps - v.average:
            average.observe()
        if pruner.finalized:
            _shrink(v, pruner, optimizer)
            continue
        if budget is not None:
            budget.ascend()
        if v.noise == "none" or step + 1 >= v.noise_off:
            for mask in masks.values():
                mask.noise.zero_()
        if means is not None and not pruner.warm:
            means.fold()
        if not pruner.warm:
            flips.append(pruner.flips)
        if step + 1 == v.stage_one:
            if v.allocation == "random inside":
                shuffled_inside(pruner, seed)
            pruner.finalize()
            if means is not None:
                means.fold()
            _shrink(v, pruner, optimizer)
    if average is not None:
        average.take()
    return pruner, {"flips": flips}


def _shrink(v: Variant, pruner, optimizer) -> None:
    # As PruneTrainer does; a model that is its own teacher needs all channels, one pruned from the start was built so.
    if v.rule is None and v.teacher != "self" and not pruner.shrunk:
        pruner.shrink(optimizer)
