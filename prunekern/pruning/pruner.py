"""The training-time handle of an attached model: parameter groups, budget, noise, final masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import families
from ..compacting.plan import Plan, check
from ..families import Table
from ..nn import ChannelMask
from . import budget, whole_heads
from .attached import AttachedModel
from .budget import Scores
from .config import PruneConfig
from .criteria import criterion_scores
from .followed import FollowedSteps
from .learned import refuse_flat, refuse_nothing_gathered
from .rules import check_rule, choose
from .saliency import Saliency, start_from_saliency
from .shrinking import base_norms, shrink_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Pruner(AttachedModel):
    """Returned by `attach`. `step()` goes after `optimizer.step()`, `finalize()` between the two stages."""

    def __init__(self, model: PreTrainedModel, config: PruneConfig, table: Table):
        super().__init__(model, config, table)
        self.steps, self.flips = 0, 0  # flips: groups whose deterministic mask the last step turned
        self.warm_steps, self.ramp_steps = config.warm_steps or 0, config.ramp_steps
        self._make_saliency: Callable[[Mapping[str, ChannelMask]], Saliency] = Saliency
        self._saliency: Saliency | None = None
        self._last: np.ndarray | None = None  # deterministic masks after the last step
        self._base_norms: dict[str, float] | None = None  # once channels are dropped
        self._followed = FollowedSteps(model, list(self.layers.values()))
        self._open_while_warm()

    # -- for the optimiser ---------------------------------------------------------------------------------------

    def param_groups(self, lr: float = 5e-5, mask_lr: float = 2e-2, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for any torch optimiser: adapters and task head at `lr`; mask logits at `mask_lr`, never decayed."""
        self._followed.is_led = True
        logits = [mask.logits for mask in self.masks.values()]
        own = {id(p) for p in logits}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        groups = [{"params": rest, "lr": lr, "weight_decay": weight_decay, "name": "adapters"}]
        if logits:
            groups.append({"params": logits, "lr": mask_lr, "weight_decay": 0.0, "name": "masks"})
        return groups

    def penalty(self) -> Tensor:
        """What the budget adds to the loss: zero, as the threshold is solved for instead."""
        first: nn.Parameter = next(self.model.parameters())
        return first.new_zeros(())

    # -- the budget ----------------------------------------------------------------------------------------------

    def target(self, steps: int | None = None) -> float:
        """Scheduled share to remove after so many steps: 0 while warm, a ramp to `config.sparsity`, then held."""
        past = (self.steps if steps is None else steps) - self.warm_steps
        if past < 0 or not self.ramp_steps:
            return self.config.sparsity * (past >= 0)
        return self.config.sparsity * min(1.0, past / self.ramp_steps)

    def schedule(self, warm_steps: int, ramp_steps: int) -> None:
        """Other lengths than the config's, for a trainer that knows how long it runs.

        Where the warm steps are over by this and were not before, the logits start from what was gathered till now.
        """
        self.warm_steps, self.ramp_steps = warm_steps, ramp_steps
        if self.warm and self.steps >= warm_steps and not self.finalized and self._has_saliency():
            start_from_saliency(self.masks, self.table, self.config)
        self._open_while_warm()

    def settle(self) -> None:
        """After the model's state was loaded: masks that came out final are not warm any more."""
        self._open_while_warm()

    @property
    def warm(self) -> bool:
        """Whether all masks are on, and saliency is gathered."""
        return self._saliency is not None

    def gather_with(self, make: Callable[[Mapping[str, ChannelMask]], Saliency]) -> None:
        """Gather saliency by what `make(masks)` returns, a `Saliency` whose `observe` is called after every warm step,
        in place of the one in use: for experiments with other measures of what a channel is worth.
        """
        self._make_saliency = make
        if self.warm:
            self._saliency = make(self.masks)

    def _open_while_warm(self) -> None:
        warm = self.steps < self.warm_steps and bool(self.masks) and not self.finalized
        if warm and self._saliency is None:
            self._saliency = self._make_saliency(self.masks)
        elif self._saliency is not None and not warm:
            self._saliency.close()
            self._saliency = None

    def _has_saliency(self) -> bool:
        return any(not mask.saliency.is_meta and bool(mask.saliency.any()) for mask in self.masks.values())

    @torch.no_grad()
    def step(self) -> bool:
        """After `optimizer.step()`: refresh the cached norms; gather saliency, or follow the budget and draw the next
        step's noise.

        Nothing, and False, where gradients have come in since and the optimiser has not taken them: under
        `accelerator.accumulate`, and for a step that a loss scaler left out. Steps are then those of the optimiser.
        FloatingPointError where the mask logits are not finite any more; RuntimeError where the warm steps are over
        and masks have got no gradient.
        """
        if not self._followed.take():
            return False
        self.steps += 1
        for layer in self.layers.values():
            if layer.norm_grad == "detached":
                layer.refresh()
        masks = self.masks
        if not masks or self.finalized:
            return True
        if self._saliency is not None:
            self._saliency.observe()
            if self.steps < self.warm_steps:
                for mask in masks.values():  # wherever an optimiser moved its logits, a mask stays on
                    mask.threshold.copy_(mask.logits.min() - 1)
                return True
            if self._followed.is_led:
                refuse_nothing_gathered("step", masks, self._saliency.reached, self.steps)
            start_from_saliency(self.masks, self.table, self.config)
            self._open_while_warm()
        logits = self.logits()
        bad = next((c for c, v in logits.items() if not np.isfinite(v).all()), None)
        if bad is not None:
            raise FloatingPointError(
                f"mask logits of {bad!r} are not finite after step {self.steps}; training diverged"
            )
        threshold = budget.solve_threshold(self.table, logits, self.target(), self.config.cost)
        for mask in masks.values():
            mask.threshold.fill_(threshold)
        now = np.concatenate(list(logits.values())) > threshold
        self.flips = 0 if self._last is None else int((now != self._last).sum())
        self._last = now
        self._draw()
        if self.steps == self.warm_steps + self.ramp_steps:
            self._refuse_unlearned("step")
        return True

    def _refuse_unlearned(self, who: str) -> None:
        if self.config.sparsity and not self._has_saliency():
            steps = self.steps if self._followed.is_led or not self.steps else None
            refuse_flat(who, self.masks, self.logits(), self._followed.reached, steps)

    def _draw(self) -> None:
        # Seeded by (seed, step) alone: a resumed run, and every rank of a parallel one, sees the same masks.
        mixed = np.random.SeedSequence((self.config.seed, self.steps)).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device="cpu").manual_seed(int(mixed) & (2**63 - 1))
        for mask in self.masks.values():
            mask.draw(generator)

    # -- the stage boundary --------------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self, rule: str = "learned", criterion: str | Scores = "magnitude") -> dict[str, Any]:
        """Make the masks final: deterministic, aligned, the target met from above to within one alignment step.

        rule "learned" ranks all channel groups by their logits. rule "stock" does, too, but leaves what transformers
        loads without prunekern (`save_stock`): as many whole heads, and FFN channels, in every block, and all
        else; `whole_heads.select_stock` says which (its steps are heads as well). rule "heads" lies between: whole
        heads and FFN channels (multiples of `align`), as many in each block as the logits say, for engines that take a
        number of heads and a width for each layer (`heads_by_layer.select_heads`). rule "uniform" is the baseline: the
        same fraction of every mask, chosen by `criterion`: "random" (seeded by config.seed), "magnitude" (the
        carrier's), "saliency" (what the warm steps gathered), or scores of your own, float [groups] by carrier; the
        lowest go.
        Returns {"sparsity", "target", "cost", "kept": {carrier: [kept, of]}, "by_kind": {kind: [kept, of]}}; rules
        "stock" and "heads" add what they gave up against the learned one: "kept_score" and "given_up", see
        `whole_heads.choose`.
        ValueError as `check_rule`, and for scores that are not finite; the masks are then left as they were.
        RuntimeError after `shrink`: what the masks removed is gone; and for all rules but "uniform" after a
        training loop that no mask got a gradient from. Without any training they warn: ties decide. "uniform" needs
        none.
        """
        if self.shrunk:
            raise RuntimeError("finalize: the pruned channels are dropped already (pruner.shrink); masks cannot change")
        self.check_rule(rule, criterion)
        extra: dict[str, Any] = {}
        if self.masks:
            if rule != "uniform" and self.warm and self._has_saliency():
                start_from_saliency(self.masks, self.table, self.config)
            elif rule != "uniform":
                self._refuse_unlearned("finalize")
            scores = self._scores(criterion) if rule == "uniform" else self.logits()
            kept, extra = choose(rule, scores, self.table, self.config, self._head_counts(rule))
            for carrier, mask in self.masks.items():
                mask.finalize(kept[carrier].to(mask.logits.device))
                mask.logits.grad = None
            self._open_while_warm()
        return self.report() | extra

    def check_rule(self, rule: str = "learned", criterion: str | Scores = "magnitude") -> None:
        """ValueError where `finalize(rule, criterion)` would refuse: so that a trainer can say so before it trains.

        Saliency that is not gathered yet is refused by `finalize` only.
        """
        check_rule(rule, criterion, self.masks, self.table, self.config, self._head_counts(rule))

    def compare_stock(self) -> dict[str, Any]:
        """What rule "stock" would give up against rule "learned", were the masks made final now: the second of what
        `whole_heads.choose` returns. Nothing is changed.

        RuntimeError once the masks are final (logits are lifted then); ValueError where the stock rule would refuse.
        """
        if self.finalized:
            raise RuntimeError("stock.compare: the masks are final already; compare before pruner.finalize()")
        return whole_heads.choose(self.table, self.logits(), self.config, self._head_counts())[1]

    def _scores(self, criterion: str | Scores) -> dict[str, np.ndarray]:
        return criterion_scores(self.layers, self.masks, self.table, criterion, self.config.seed)

    def _head_counts(self, rule: str = "stock") -> tuple[int, ...]:
        """Those that rule "stock" chooses from; the others do not ask, and a model of two towers cannot say."""
        if rule != "stock":
            return ()
        return families.of(self.model).stock(getattr(self.model, "config", None)).head_counts

    def shrink(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After `finalize()`: drop the pruned channels from the masked model, in place; training goes on with the rest.

        The model computes what it did, to rounding, and keeps its parameters, smaller: their moments in `optimizer`
        follow them (without one, make a new optimiser). Each layer is then a DoRA layer of its own on its kept rows
        and columns. `plan`, `compact`, `save_adapter` and `report` go on as before. RuntimeError before `finalize()`.
        """
        if not self.finalized:
            raise RuntimeError("shrink: the masks are not final; call pruner.finalize() first")
        if not self.shrunk:
            self.drop(self.plan(), None if optimizer is None else optimizer.state)

    def base_norms(self) -> dict[str, float]:
        """Sum of squares of every adapted layer's frozen weight before `shrink`, by module name: tells base models
        apart. Empty for a model without storage.
        """
        return base_norms(self.layers) if self._base_norms is None else self._base_norms

    def drop(self, plan: Plan, state: dict[Any, Any] | None = None) -> None:
        """All channels but those of `plan`, for a state that is to be loaded without them; see `shrink`."""
        self._base_norms = self.base_norms()
        shrink_model(self.model, plan, state)

    # -- resuming ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the model's own state does not hold (logits, thresholds and final flags are in the model's)."""
        state: dict[str, Any] = {"steps": self.steps, "warm_steps": self.warm_steps, "ramp_steps": self.ramp_steps}
        usual = (self.config.rank, self.config.alpha / self.config.rank)
        own = {n: (m.rank, m.scale) for n, m in self.layers.items() if (m.rank, m.scale) != usual}
        if own:  # of an adapter that PEFT trained with rank_pattern or alpha_pattern
            state["low_rank"] = own
        return {**state, "shrunk": self.plan().to_dict()} if self.shrunk else state

    def resume_at(self, steps: int, warm_steps: int, ramp_steps: int) -> None:
        """Continue after so many steps of such a schedule, once the model's state is loaded."""
        self.steps, self.warm_steps, self.ramp_steps = steps, warm_steps, ramp_steps
        self._open_while_warm()
        if not self.finalized and not self.warm:
            self._draw()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after `state["steps"]` steps. Call it before the model's state is loaded: a state of a shrunk
        model is loaded into a model shrunk alike, which this does; so are layers with a rank and scale of their own.
        """
        for name, (rank, scale) in state.get("low_rank", {}).items():
            if name not in self.layers:
                raise ValueError(f"load_state_dict: low_rank must name adapted layers (got {name!r})")
            self.layers[name].set_low_rank(rank, scale)
        if state.get("shrunk") is not None:
            plan = Plan.from_dict(state["shrunk"])
            if self.shrunk and plan != self.plan():
                raise ValueError("load_state_dict: the model is shrunk already, to other channels than the state's")
            if not self.shrunk:
                check(plan, self.table)
                self.drop(plan)
        self.steps = int(state["steps"])
        self.schedule(int(state["warm_steps"]), int(state["ramp_steps"]))
        if self.steps and not self.finalized and not self.warm:
            self._draw()


def compare_stock(pruner: Pruner) -> dict[str, Any]:
    """`pruner.compare_stock()`, as it was called before (`prunekern.stock.compare`)."""
    return pruner.compare_stock()
