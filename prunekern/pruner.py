"""The training-time handle of an attached model: parameter groups, budget, noise, final masks."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn

from . import budget, families
from .config import PruneConfig
from .families import Table
from .nn import ChannelMask, MaskedDoRALinear, shrink_linear
from .plan import Plan, check, from_kept, masks_of

CRITERIA = ("random", "magnitude")


class Pruner:
    """Returned by `attach`. `step()` goes after every `optimizer.step()`, `finalize()` between the two stages."""

    def __init__(self, model: nn.Module, config: PruneConfig, table: Table):
        self.model, self.config, self.table = model, config, table
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, MaskedDoRALinear)}
        self.steps, self.ramp_steps = 0, config.ramp_steps

    @property
    def masks(self) -> dict[str, ChannelMask]:
        """Channel masks by the module name of their carrier."""
        return masks_of(self.model)

    @property
    def finalized(self) -> bool:
        return all(mask._is_final for mask in self.masks.values())

    # -- for the optimiser ---------------------------------------------------------------------------------------

    def param_groups(self, lr: float = 5e-5, mask_lr: float = 2e-2, weight_decay: float = 0.0) -> list[dict]:
        """Groups for any torch optimiser: adapters and task head at `lr`; mask logits at `mask_lr`, never decayed."""
        logits = [mask.logits for mask in self.masks.values()]
        own = {id(p) for p in logits}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups = [{"params": rest, "lr": lr, "weight_decay": weight_decay, "name": "adapters"}]
        if logits:
            groups.append({"params": logits, "lr": mask_lr, "weight_decay": 0.0, "name": "masks"})
        return groups

    def penalty(self) -> Tensor:
        """What the budget adds to the loss: zero, as the threshold is solved for instead."""
        return next(self.model.parameters()).new_zeros(())

    # -- the budget ----------------------------------------------------------------------------------------------

    def target(self, steps: int | None = None) -> float:
        """Scheduled share to remove after so many steps: a ramp from 0 to `config.sparsity`, then held."""
        steps = self.steps if steps is None else steps
        return self.config.sparsity * min(1.0, steps / self.ramp_steps if self.ramp_steps else 1.0)

    @torch.no_grad()
    def _logits(self) -> dict[str, np.ndarray]:
        masks = self.masks
        if not masks:
            return {}
        flat = torch.cat([mask.logits for mask in masks.values()]).double().cpu().numpy()  # one transfer
        sizes = np.cumsum([mask.logits.numel() for mask in masks.values()])[:-1]
        return dict(zip(masks, np.split(flat, sizes), strict=True))

    def expected_sparsity(self) -> float:
        """Share removed in expectation over the mask noise (exact once final), of `config.cost`."""
        kept = {}
        for carrier, mask in self.masks.items():
            shifted = (mask.logits - mask.threshold).detach().double().cpu().numpy()
            kept[carrier] = (shifted > 0).astype(float) if mask._is_final else budget._sigmoid(shifted)
        return budget.removed_share(self.table, kept, self.config.cost)

    def sparsity(self) -> float:
        """Share that `compact` would remove with the masks as they are now, of `config.cost`."""
        return self.plan().sparsity(self.config.cost)

    def plan(self):
        """As `prunekern.plan(model)`."""
        return from_kept(self.table, {c: m.kept() for c, m in self.masks.items()})

    @torch.no_grad()
    def step(self) -> None:
        """After `optimizer.step()`: refresh the cached norms; follow the budget; draw the next step's noise.

        FloatingPointError where the mask logits are not finite any more.
        """
        self.steps += 1
        for layer in self.layers.values():
            if layer.norm_grad == "detached":
                layer.refresh()
        masks = self.masks
        if not masks or self.finalized:
            return
        logits = self._logits()
        bad = next((c for c, v in logits.items() if not np.isfinite(v).all()), None)
        if bad is not None:
            raise FloatingPointError(
                f"mask logits of {bad!r} are not finite after step {self.steps}; training diverged"
            )
        threshold = budget.solve_threshold(self.table, logits, self.target(), self.config.cost)
        for mask in masks.values():
            mask.threshold.fill_(threshold)
        self._draw()

    def _draw(self) -> None:
        # Seeded by (seed, step) alone: a resumed run, and every rank of a parallel one, sees the same masks.
        mixed = np.random.SeedSequence((self.config.seed, self.steps)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(mixed) & (2**63 - 1))
        for mask in self.masks.values():
            mask.draw(generator)

    # -- the stage boundary --------------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self, rule: str = "learned", criterion: str = "magnitude") -> dict:
        """Make the masks final: deterministic, aligned, the target met from above to within one alignment step.

        rule "learned" ranks all channel groups by their logits. rule "uniform" is the baseline: the same fraction of
        every mask, chosen by `criterion`: "random" (seeded by config.seed) or "magnitude" (the carrier's).
        Returns {"sparsity", "target", "cost", "kept": {carrier: [kept, of]}, "by_kind": {kind: [kept, of]}}.
        """
        table, config = self.table, self.config
        if rule not in ("learned", "uniform"):
            raise ValueError(f"finalize: rule must be 'learned' or 'uniform' (got {rule!r})")
        if rule == "uniform" and criterion not in CRITERIA:
            raise ValueError(f"finalize: criterion must be one of {CRITERIA} (got {criterion!r})")
        if self.masks:
            scores = self._logits() if rule == "learned" else self._criterion(criterion)
            bad = [c for c, v in scores.items() if not np.isfinite(v).all()]
            if bad:
                raise ValueError(f"finalize: scores of {bad[0]!r} are not finite; the masks are left as they were")
            select = budget.select_global if rule == "learned" else budget.select_uniform
            kept = select(table, scores, config.sparsity, config.cost, config.align)
            for carrier, mask in self.masks.items():
                mask.finalize(kept[carrier].to(mask.logits.device))
                mask.logits.grad = None
        return self.report()

    def _criterion(self, criterion: str) -> dict[str, np.ndarray]:
        if criterion == "random":
            rng = np.random.default_rng(self.config.seed)
            return {c: rng.random(m.logits.numel()) for c, m in self.masks.items()}
        scores = {}
        for carrier in self.masks:
            magnitude = self.layers[carrier].magnitude.detach().double().cpu()
            scores[carrier] = magnitude[self.table.groups[carrier].rows].square().sum(1).sqrt().numpy()
        return scores

    @property
    def shrunk(self) -> bool:
        return any(getattr(layer, "is_shrunk", False) for layer in self.layers.values())

    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After `finalize()`: drop the pruned channels from the masked model, in place; training goes on with the rest.

        The model computes what it did, to rounding, and keeps its parameters, smaller: their moments in `optimizer`
        follow them (without one, make a new optimiser). Each layer is then a DoRA layer of its own on its kept rows
        and columns. `plan`, `compact`, `save_adapter` and `report` go on as before. RuntimeError before `finalize()`.
        """
        if not self.finalized:
            raise RuntimeError("shrink: the masks are not final; call pruner.finalize() first")
        if not self.shrunk:
            self._shrink(self.plan(), None if optimizer is None else optimizer.state)

    @torch.no_grad()
    def _shrink(self, plan: Plan, state: dict | None = None) -> None:
        def make(name: str, in_index, out_index, out_features: int, activation: str) -> nn.Module:
            kept = plan.layers[name]
            layer = shrink_linear(self.model.get_submodule(name), kept.rows, kept.cols, state)
            layer.take_place(out_index, out_features, activation)
            return layer

        families.of(self.model).rebuild(self.model, plan, make)

    def report(self) -> dict:
        """What the masks keep now, as `finalize` returns it."""
        settled = self.table.settle({c: m.kept() for c, m in self.masks.items()})
        by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for carrier, kept in settled.items():
            for i, n in enumerate((int(kept.sum()), kept.numel())):
                by_kind[self.table.groups[carrier].kind][i] += n
        return {
            "sparsity": self.sparsity(),
            "target": self.config.sparsity,
            "cost": self.config.cost,
            "kept": {c: [int(k.sum()), k.numel()] for c, k in settled.items()},
            "by_kind": dict(by_kind),
        }

    # -- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What the model's own state does not hold (logits, thresholds and final flags are in the model's)."""
        state = {"steps": self.steps, "ramp_steps": self.ramp_steps}
        return {**state, "shrunk": self.plan().to_dict()} if self.shrunk else state

    def load_state_dict(self, state: dict) -> None:
        """Continue after `state["steps"]` steps. Call it before the model's state is loaded: a state of a shrunk
        model is loaded into a model shrunk alike, which this does.
        """
        if state.get("shrunk") is not None and not self.shrunk:
            plan = Plan.from_dict(state["shrunk"])
            check(plan, self.table)
            self._shrink(plan)
        self.steps, self.ramp_steps = int(state["steps"]), int(state["ramp_steps"])
        if self.steps and not self.finalized:
            self._draw()
