"""What each layer of a compact model loses in fewer bits on real inputs, and what is held in more bits therefore."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from .plan import plan as plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_DB = {"bf16": 20.0, "int8": 20.0, "int4": 10.0}
MOST_ROWS = 4096  # of each layer's inputs
_BLOCK = 1 << 22  # numbers of a layer's inputs or outputs in memory at once, a few times over


@dataclass(frozen=True)
class LayerLoss:
    """What one layer loses: `db` in the kind that was asked for, `held_db` in the one it is held in, `held`.

    Signal to noise of its products against fp32, in dB (see `calibrate`); infinite where nothing is lost or nothing was
    computed.
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
) -> Calibration:
    """Measure what each layer of a compact model loses in `weights` on the inputs that it has in `batches`, and hold
    those that lose too much in more bits. The model is set so, and its config says so from now on: `save` writes it
    down, and `load(path, weights=...)` and `set_weights` follow it. hold: False leaves the weights in fp32, so that
    `save` writes them as they are, and not as they were rounded; `set_weights` does the rest.

    small: a compact model in fp32, as `compact` and `load` return it. batches: mappings of what the model is called
    with, tensors or lists of equal length ([rows, tokens], or [tokens] of one text); labels are left out, and padding
    (zeros in attention_mask) is not measured. One pass, until every layer has seen `most_rows` rows.
    weights, activations: as of `load`. "auto" counts the rounding of x, as other machines may do it where this one does
    not. least_db: signal to noise of a layer's products, before bias, activation and residual, against fp32: the power
    of the noise in each row, relative to that row's, averaged over rows. Every token counts alike: the first one of a
    text can be a hundred times as large as the others, and would hide what they lose. A layer below least_db is
    held in the first kind with more bits that reaches it, fp32 at last; query, key and value of an attention, which
    are one product, are held alike, and so are the layers of an MLP. None: 20 dB for int8 and bf16, 10 dB for int4.

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
    losses = {name: _Loss(name, module, kinds, activations, most_rows) for name, module in modules.items()}
    _run(model, batches, losses)

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


class _Loss:
    """The sums of one layer: a hook before its forward pass adds what its inputs make."""

    def __init__(self, name: str, module: nn.Module, kinds: Sequence[str], activations: str, most_rows: int):
        self.name, self.module, self.activations = name, module, activations
        self.rows, self.most_rows = 0, most_rows
        self.noise = dict.fromkeys(kinds, 0.0)  # relative to the signal, summed over rows
        self.mask: Tensor | None = None  # [batch, tokens] bool of the batch that runs: which are no padding

    def db(self, kind: str) -> float:
        """Signal to noise."""
        noise = self.noise.get(kind, 0.0)
        return 10.0 * math.log10(self.rows / noise) if noise > 0.0 else math.inf

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        x: Tensor = args[0] if args else kwargs["x"]
        with torch.autocast(x.device.type, enabled=False):
            self._add(x.detach())

    def _add(self, x: Tensor) -> None:
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        module: Any = self.module
        index, weight = getattr(module, "in_index", None), module.weight.detach()
        if not x.numel() or not weight.numel():
            return
        x = x.reshape(-1, x.shape[-1])[: self.most_rows - self.rows].float()
        x = x if index is None else x[:, index]
        self.rows += len(x)
        if not bool(x.isfinite().all()):
            raise ValueError(f"calibrate: batches must make finite numbers (layer {self.name!r} reads NaN or infinity)")
        rows = max(1, _BLOCK // max(weight.shape))
        rounded = {kind: _rounded(weight, kind) for kind in self.noise}
        for block in x.split(rows):
            y = F.linear(block, weight)  # without the bias: it loses nothing, and a large one would hide what is lost
            signal = y.square().sum(1).double()  # [rows]
            for kind, near in rounded.items():
                noise = F.linear(_rounded_rows(block, kind, self.activations), near).sub_(y).square().sum(1).double()
                self.noise[kind] += float((noise / signal).nan_to_num(0.0, posinf=1.0).sum())  # 0 / 0: nothing is lost


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


def _run(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], losses: Mapping[str, _Loss]) -> None:
    device, any_batch = next(model.parameters()).device, False
    with _listening(model, losses), torch.no_grad():
        for batch in batches:
            inputs = _inputs(batch, device)
            mask = inputs.get("attention_mask")
            for loss in losses.values():
                loss.mask = mask.bool() if mask is not None and mask.dim() == 2 else None
            model(**inputs)
            any_batch = True
            if all(loss.rows >= loss.most_rows for loss in losses.values() if loss.rows):
                break
    if not any_batch:
        raise ValueError("calibrate: batches must hold at least one batch (got none)")


@contextmanager
def _listening(model: PreTrainedModel, losses: Mapping[str, _Loss]) -> Iterator[None]:
    """In eval mode, with the hooks set; as it was afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        model.eval()
        for loss in losses.values():
            handles.append(loss.module.register_forward_pre_hook(loss.add, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _inputs(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """What the model is called with. TypeError or ValueError for what is no batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"calibrate: batches must be mappings of tensors (got {type(batch).__name__})")
    inputs = {}
    for name, value in batch.items():
        if name == "labels":
            continue
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(
                f"calibrate: batches must be of tensors, or lists of equal length ({name!r}: {said})"
            ) from None
        inputs[name] = (tensor if tensor.dim() > 1 else tensor.unsqueeze(0)).to(device)
    return inputs


def _write(model: PreTrainedModel, held: Held) -> None:
    from .hf import PrunekernConfig

    section: Any = model.config.quantization_config
    section = dict(section) if isinstance(section, Mapping) else section.to_dict()
    section.pop("format", None)
    model.config.quantization_config = PrunekernConfig(**section | {"held": held.to_dict()})
