"""What each layer of a compact model loses in fewer bits on real inputs, and what is held in more bits therefore."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import families
from ..families.wrapped import unwrapped
from ..nn import CompactLinear
from ..ops.packing import WEIGHTS
from ..ops.quantized import quantize_rows
from .checkpoint import check_kinds, set_weights
from .head import word_head
from .held import Held, digest
from .listening import Listener, run
from .plan import plan as plan_of
from .smoothing import Largest, smooth, smoothings_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By kind: what only outliers are below. Of int8, the demo's model has 26 dB and more in every layer, and loses nothing
# that its test sentences can tell; SmolLM2-135M has 18 as it comes and 31 smoothed. More buys perplexity with bytes:
# bench/accuracy/calibration.py. (int4, in groups of 32, is about 20 dB for normal weights; its number is a guess.)
LEAST_DB = {"bf16": 25.0, "int8": 25.0, "int4": 15.0}
MOST_ROWS = 4096  # of each layer's inputs
_MOST_DB = 120.0  # of a row: fp32 itself has about that
_BLOCK = 1 << 22  # numbers of a layer's inputs or outputs in memory at once, a few times over


@dataclass(frozen=True)
class LayerLoss:
    """What one layer loses: `db` in the kind that was asked for, `held_db` in the one it is held in, `held`.

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
    rows: how many rows of inputs each layer was measured on, at most.
    """

    weights: str
    activations: str
    least_db: float
    rows: int
    layers: Sequence[LayerLoss]

    @property
    def held(self) -> dict[str, str]:
        """Kinds by name, of the layers that are not held in what was asked for."""
        return {layer.name: layer.held for layer in self.layers if layer.held != self.weights}

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
) -> Calibration:
    """Measure what each layer of a compact model loses in `weights` on the inputs that it has in `batches`, and hold
    those that lose too much in more bits. The model is set so, and its config says so from now on: `save` writes it
    down, and `load(path, weights=...)` and `set_weights` follow it. hold: False leaves the weights in fp32, so that
    `save` writes them as they are, and not as they were rounded; `set_weights` does the rest.

    Where x is rounded, channels of a decoder that are larger than others are made smaller first, and the weights that
    read them larger: the model's function stays what it was, up to rounding in fp32. smooths: False leaves that out.

    small: a compact model in fp32, as `compact` and `load` return it. batches: mappings of what the model is called
    with, tensors or lists of equal length ([rows, tokens], or [tokens] of one text); labels are left out, and padding
    (zeros in attention_mask) is not measured. Two passes, until every layer has seen `most_rows` rows; encoders take
    one.
    weights, activations: as of `load`. "auto" counts the rounding of x, as other machines may do it where this one does
    not. least_db: signal to noise of a layer's products, before bias, activation and residual, against fp32, in every
    row, averaged in dB. Every token counts alike: the first one of a text can be a hundred times as large as the
    others, and would hide what they lose. A layer below least_db is
    held in the first kind with more bits that reaches it, fp32 at last; query, key and value of an attention, which
    are one product, are held alike, and so are the layers of an MLP. None: 25 dB for int8 and bf16, 15 dB for int4.

    Besides the model, memory is taken for one layer's weight and a block of its rows. ValueError or TypeError naming
    the argument: for a model that is not compact, or not in fp32, no batches, and layers that read infinities or NaN.
    """
    model: PreTrainedModel = unwrapped(small, "calibrate")
    check_kinds(weights, activations, "calibrate")
    if weights not in LEAST_DB:
        raise ValueError(f"calibrate: weights must be one of {', '.join(LEAST_DB)} (got {weights!r})")
    least_db = LEAST_DB[weights] if least_db is None else least_db
    if isinstance(least_db, bool) or not isinstance(least_db, (int, float)) or not math.isfinite(least_db):
        raise ValueError(f"calibrate: least_db must be a finite number of dB (got {least_db!r})")
    if isinstance(most_rows, bool) or not isinstance(most_rows, int) or most_rows < 1:
        raise ValueError(f"calibrate: most_rows must be a positive whole number (got {most_rows!r})")
    plan = plan_of(model)
    modules = _measurable(model, plan.layers)
    kinds = tuple(reversed(WEIGHTS[1 : WEIGHTS.index(weights) + 1]))  # what was asked for, then more and more careful
    if smooths and weights != "bf16" and activations != "float":
        where = smoothings_of(model, plan)
        tops = {name: Largest(name, model.get_submodule(name), most_rows) for one in where for name in one.readers}
        if tops:
            batches = run(model, batches, list(tops.values()))
            smooth(model, where, tops, lambda x, weight: -float(_db(x, weight, weights, activations).mean()))
    losses = {name: _Loss(name, module, kinds, activations, most_rows) for name, module in modules.items()}
    run(model, batches, list(losses.values()))

    chosen = {name: _chosen(loss, kinds, least_db) for name, loss in losses.items()}
    for alike in _alike(model):
        for name in alike:
            chosen[name] = min((chosen[n] for n in alike), key=WEIGHTS.index)
    head = next((name for name in chosen if name not in plan.layers), None)
    layers = {name: kind for name, kind in chosen.items() if kind != weights and name != head}
    held_head = weights if head is None else chosen[head]
    _write(model, Held(weights, activations, float(least_db), layers, held_head, digest(plan)))
    if hold:
        set_weights(small, weights, activations)
    rows = max(loss.rows for loss in losses.values())
    found = [LayerLoss(n, loss.db(weights), chosen[n], loss.db(chosen[n])) for n, loss in losses.items()]
    return Calibration(weights, activations, float(least_db), rows, found)


class _Loss(Listener):
    """The sums of one layer."""

    def __init__(self, name: str, module: nn.Module, kinds: Sequence[str], activations: str, most_rows: int):
        super().__init__(name, module, most_rows)
        self.activations = activations
        self.sums = dict.fromkeys(kinds, 0.0)  # of dB, over rows

    def db(self, kind: str) -> float:
        """Signal to noise."""
        return self.sums[kind] / self.rows if self.rows and kind in self.sums else math.inf

    def see(self, x: Tensor) -> None:
        """See `Listener`."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        for kind in self.sums:
            self.sums[kind] += float(_db(x, weight, kind, self.activations).sum())


def _db(x: Tensor, weight: Tensor, kind: str, activations: str) -> Tensor:
    """Signal to noise of every row of x [rows, K] times weight [N, K], [rows] float64 in dB; a row of zeros has the
    most. Without the bias, which loses nothing: a large one would hide what is lost.
    """
    near, found = _rounded(weight, kind), []
    for block in x.split(max(1, _BLOCK // max(weight.shape))):
        y = F.linear(block, weight)
        signal = y.square().sum(1).double()
        noise = F.linear(_rounded_rows(block, kind, activations), near).sub_(y).square().sum(1).double()
        found.append((signal / noise).nan_to_num(math.inf).log10().mul(10.0).clamp(-_MOST_DB, _MOST_DB))
    return torch.cat(found)


def _rounded(weight: Tensor, kind: str) -> Tensor:
    """A weight [N, K] as it is held in a kind, in fp32."""
    return CompactLinear(weight, weights=kind).plain_weight().detach().float()


def _rounded_rows(x: Tensor, kind: str, activations: str) -> Tensor:
    """x [rows, K] as it is multiplied with weights of a kind, in fp32."""
    if activations == "float":
        return x
    if kind == "bf16":
        return x.bfloat16().float()
    q, scale = quantize_rows(x)
    return q.float() * scale


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


def _alike(model: PreTrainedModel) -> Iterator[tuple[str, ...]]:
    """Names of layers that are held alike: what is packed as one, and what runs as one call."""
    for _, block in families.of(model).blocks(model):
        yield block.q, block.k, block.v
        gate = getattr(block, "gate", None)
        yield (block.up, block.down) if gate is None else (block.up, block.down, gate)


def _chosen(loss: _Loss, kinds: Sequence[str], least_db: float) -> str:
    return next((kind for kind in kinds if loss.db(kind) >= least_db), "fp32")


def _write(model: PreTrainedModel, held: Held) -> None:
    from .hf import PrunekernConfig

    section: Any = model.config.quantization_config
    section = dict(section) if isinstance(section, Mapping) else section.to_dict()
    section.pop("format", None)
    model.config.quantization_config = PrunekernConfig(**section | {"held": held.to_dict()})
