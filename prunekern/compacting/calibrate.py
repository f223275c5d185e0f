"""What each layer of a compact model loses in fewer bits on real inputs, and what is held in more bits therefore."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import families
from ..families.wrapped import is_transformers, unwrapped
from ..ops.packing import WEIGHTS
from .checkpoint import check_kinds, set_weights
from .choosing import WIDE, by_cost, by_decibels
from .compensated import Int4, compensated_layers, put
from .costs import costs
from .head import word_head
from .held import HEAD, Held, digest
from .listening import run
from .losing import Loss, decibels, rounded
from .plan import Plan
from .plan import plan as plan_of
from .smoothing import Largest, smooth, smoothings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By kind: what only outliers are below. Of int8, the demo's model has 26 dB and more in every layer, and loses nothing
# that its test sentences can tell; SmolLM2-135M has 18 as it comes and 31 smoothed. (int4, in groups of 32, is about 20
# dB for normal weights; its number is a guess.)
LEAST_DB = {"bf16": 25.0, "int8": 25.0, "int4": 15.0}
# By kind: nats of a prediction that all layers together may cost. SmolLM2-135M, a fifth removed, then has 0.5 % more
# perplexity in int8 and 3.3 % in int4; 0.0065 and 0.025 gave 1.1 % and 4.8 % (bench/results/calibration.json).
MOST_NATS = {"bf16": 0.005, "int8": 0.005, "int4": 0.02}
MOST_ROWS = 4096  # of each layer's inputs
MEASURED_ROWS = 1024  # of them: what is lost is a mean, and is told to a tenth of a dB by so many


@dataclass(frozen=True)
class LayerLoss:
    """What one layer loses: `db` in the kind that was asked for, `held_db` in the one it is held in, `held`: a kind of
    weights, or "int8, x in fp32", where x is not rounded.

    Signal to noise of its products against fp32, in dB (see `calibrate`); infinite where it is held in fp32 or nothing
    was computed.
    """

    name: str
    db: float
    held: str
    held_db: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found and chose; as text, a table.

    layers: a LayerLoss for every block linear, in the order of the plan, then of the head of a causal language model.
    rows: how many rows of inputs each layer was measured on, at most. nats: what all layers together are estimated to
    cost a prediction, as they are held; None where `least_db` chose.
    """

    weights: str
    activations: str
    least_db: float
    rows: int
    layers: Sequence[LayerLoss]
    nats: float | None = None

    @property
    def held(self) -> dict[str, str]:
        """Kinds by name, of the layers that are not held in what was asked for."""
        kinds = {layer.name: _weights(layer.held) for layer in self.layers}
        return {name: kind for name, kind in kinds.items() if kind != self.weights}

    def __str__(self) -> str:
        wide = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':<{wide}}  {f'dB in {self.weights}':>10}  held in"]
        for layer in self.layers:
            held = layer.held if layer.held == self.weights else f"{layer.held} ({layer.held_db:.1f} dB)"
            lines.append(f"{layer.name:<{wide}}  {layer.db:>10.1f}  {held}")
        lines.append(
            f"{len(self.held)} of {len(self.layers)} layers are held in more bits than {self.weights}, for at least "
            f"{self.least_db:g} dB on {self.rows:,} rows"
        )
        if self.nats is not None:
            lines[-1] += f"; together they cost about {self.nats:.4f} nats a prediction"
        return "\n".join(lines)


def calibrate(
    small: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    least_db: float | None = None,
    weights: str = "int8",
    activations: str = "auto",
    most_rows: int = MOST_ROWS,
    hold: bool = True,
    smooths: bool = True,
    most_nats: float | None = None,
    compensates: bool = True,
) -> Calibration:
    """Measure what each layer of a compact model loses in `weights` on the inputs that it has in `batches`, and hold
    those that cost too much in more bits. The model is set so, and its config says so from now on: `save` writes it
    down, and `load(path, weights=...)` and `set_weights` follow it. hold: False leaves the weights in fp32, so that
    `save` writes them as they are, and not as they were rounded; `set_weights` does the rest.

    Where x is rounded, channels of a decoder that are larger than others are made smaller first, and the weights that
    read them larger: the model's function stays what it was, up to rounding in fp32. smooths: False leaves that out.
    For int4, weights of blocks are rounded so that what one input loses the next make good (`compensating`): these
    weights are changed, to numbers that int4 holds as they are, in layers held in int4, whatever `hold` is.
    compensates: False leaves that out.

    small: a compact model in fp32, as `compact` and `load` return it. batches: mappings of what the model is called
    with, tensors or lists of equal length ([rows, tokens], or [tokens] of one text); labels are left out, and padding
    (zeros in attention_mask) is not measured. Used until every layer has seen `most_rows` rows, and then again; what is
    lost is measured on the first 1,024 of them.
    weights, activations: as of `load`. "auto" counts the rounding of x, as other machines may do it where this one does
    not.

    What is held in more bits: query, key and value of an attention, which are one product, are held alike, and so are
    the layers of an MLP.
    - least_db None: as few bytes as do, for layers that together cost at most `most_nats` a prediction (of a token, or
      a text's class), by a Fisher estimate (`costs`). None: 0.005 for int8 and bf16, 0.02 for int4: so much does the
      loss grow, times 100 about so many percent the perplexity. Among what is tried are int8 weights
      that read x as it is, which is not a byte more.
    - least_db given, or a model that predicts no classes, then 25 dB for int8 and bf16, 15 dB for int4: a layer below
      it is held in the first kind with more bits that reaches it, fp32 at last. It is the signal to noise of a layer's
      products, before bias, activation and residual, against fp32, in every row, averaged in dB. Every token counts
      alike: the first one of a text can be a hundred times as large as the others, and would hide what they lose.

    Besides the model, memory is taken for one layer's weight and a block of its rows; where costs are estimated for a
    backward pass of one batch; and for int4 for the rounded weights, a block's Gram matrices and the hidden states of
    the batches. ValueError or TypeError naming the argument: for a model that is not compact, or not in fp32, no
    batches, and layers that read infinities or NaN.
    """
    model: PreTrainedModel = unwrapped(small, "calibrate")
    _check(weights, activations, least_db, most_rows, most_nats)
    if not is_transformers(model):
        raise ValueError(f"calibrate: small must be a model of transformers (got {type(model).__name__})")
    plan = plan_of(model)
    modules = _measurable(model, plan.layers)
    kinds = tuple(reversed(WEIGHTS[1 : WEIGHTS.index(weights) + 1]))  # what was asked for, then more and more careful
    if smooths and weights != "bf16" and activations != "float":
        batches = _smooth(model, plan, batches, weights, activations, most_rows)
    in_int4: dict[str, Int4] = {}
    if compensates and weights == "int4":
        in_int4, batches = compensated_layers(model, batches, most_rows)
    head = next((name for name in modules if name not in plan.layers), None)
    more = (*kinds, WIDE) if least_db is None and weights != "bf16" and activations != "float" else kinds
    losses = {
        n: Loss(n, module, more, activations, min(most_rows, MEASURED_ROWS), in_int4.get(n))
        for n, module in modules.items()
    }
    used = run(model, batches, list(losses.values()))

    units, found = _units(model, losses), None
    if least_db is None:
        found = costs(model, used, {name: loss.products for name, loss in losses.items()})
    if found is not None:
        sizes = {name: module.weight.numel() for name, module in modules.items()}  # type: ignore[operator]
        chosen = by_cost(units, kinds, found, sizes, MOST_NATS[weights] if most_nats is None else most_nats)
    else:
        db = {name: {kind: loss.db(kind) for kind in kinds} for name, loss in losses.items()}
        chosen = by_decibels(units, kinds, db, LEAST_DB[weights] if least_db is None else least_db)
    layers = [LayerLoss(n, loss.db(weights), chosen[n], loss.db(chosen[n])) for n, loss in losses.items()]
    if found is not None:  # what all layers have, as it turned out
        least = min((layer.held_db for layer in layers), default=math.inf)
        least_db = math.floor(10 * least) / 10 if math.isfinite(least) else LEAST_DB[weights]
    least = float(LEAST_DB[weights] if least_db is None else least_db)

    kept = {name: _weights(kind) for name, kind in chosen.items()}
    careful = {name: kind for name, kind in kept.items() if kind != weights and name != head}
    float_x = [HEAD if name == head else name for name, kind in chosen.items() if kind == WIDE]
    held_head = weights if head is None else kept[head]
    _write(model, Held(weights, activations, least, careful, held_head, digest(plan), tuple(float_x)))
    put(model, {name: weight.weight() for name, weight in in_int4.items() if chosen[name] == "int4"})
    if hold:
        set_weights(small, weights, activations)
    rows = max(loss.rows for loss in losses.values())
    nats = None if found is None else sum(found[name].get(kind, 0.0) for name, kind in chosen.items())
    return Calibration(weights, activations, least, rows, layers, nats)


def _check(weights: str, activations: str, least_db: Any, most_rows: Any, most_nats: Any) -> None:
    if weights not in LEAST_DB:
        raise ValueError(f"calibrate: weights must be one of {', '.join(LEAST_DB)} (got {weights!r})")
    check_kinds(weights, activations, "calibrate")
    if least_db is not None and not _is_finite(least_db):
        raise ValueError(f"calibrate: least_db must be a finite number of dB (got {least_db!r})")
    if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 1:
        raise ValueError(f"calibrate: most_rows must be a positive whole number (got {most_rows!r})")
    if most_nats is not None and not (_is_finite(most_nats) and most_nats >= 0):
        raise ValueError(f"calibrate: most_nats must be a finite number, 0 or more (got {most_nats!r})")
    if most_nats is not None and least_db is not None:
        raise ValueError(f"calibrate: most_nats must be None beside least_db (got {most_nats!r}): one rule chooses")


def _weights(held: str) -> str:
    """The kind of weights of what a layer is held in."""
    return "int8" if held == WIDE else held


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


def _smooth(
    model: PreTrainedModel, plan: Plan, batches: Iterable[Any], weights: str, activations: str, most_rows: int
) -> Iterable[Any]:
    """Smooth where that can be done; the batches, as they may be had once only."""
    where = smoothings_of(model, plan)
    tops = {name: Largest(name, model.get_submodule(name), most_rows) for one in where for name in one.readers}
    if not tops:
        return batches
    used = run(model, batches, list(tops.values()))
    smooth(model, where, tops, lambda x, w: -float(decibels(x, w, rounded(w, weights), weights, activations).mean()))
    return used


def _measurable(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """The block linears by name, then the head of a causal language model. ValueError unless all are in fp32."""
    modules: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
    head = word_head(model)
    if head is not None:
        modules[next(name for name, module in model.named_modules() if module is head)] = head
    for name, module in modules.items():
        dtype: torch.dtype = module.weight.dtype  # type: ignore[assignment]
        if dtype != torch.float32:
            raise ValueError(
                f"calibrate: small must be in fp32 (got {dtype} in {name!r}, which has lost what is to be measured): "
                "load it with weights='fp32'"
            )
    return modules


def _units(model: PreTrainedModel, names: Iterable[str]) -> list[tuple[str, ...]]:
    """All these layers, by those that are held alike: what is packed as one, and what runs as one call."""
    alike = []
    for _, block in families.of(model).blocks(model):
        gate = getattr(block, "gate", None)
        alike += [(block.q, block.k, block.v), (block.up, block.down) if gate is None else (block.up, block.down, gate)]
    together = {name for unit in alike for name in unit}
    return alike + [(name,) for name in names if name not in together]


def _write(model: PreTrainedModel, held: Held) -> None:
    from .hf import PrunekernConfig

    section: Any = model.config.quantization_config
    section = dict(section) if isinstance(section, Mapping) else section.to_dict()
    section.pop("format", None)
    model.config.quantization_config = PrunekernConfig(**section | {"held": held.to_dict()})
