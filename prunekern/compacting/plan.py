"""Kept indices of every block linear: plain data, JSON-able, checked against the architecture it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import families
from ..families import COSTS, Table
from ..families.wrapped import unwrapped
from ..nn import ChannelMask, CompactLinear, MaskedDoRALinear

FORMAT = 1
MOST_CHANNELS = 1 << 24  # far above any layer; an edited file must not make us allocate what it says
_KEY = "_prunekern_plan"


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Kept rows and columns of one linear: sorted int64 indices into its dense [out_features, in_features]."""

    rows: Tensor
    cols: Tensor
    out_features: int
    in_features: int
    bias: bool

    def params(self) -> int:
        return self.rows.numel() * (self.cols.numel() + self.bias)

    def dense_params(self) -> int:
        """Of the layer before anything was removed."""
        return self.out_features * (self.in_features + self.bias)


@dataclass(frozen=True, eq=False)
class Plan:
    """What `compact` keeps. `layers`: by module name, every linear of every block."""

    layers: Mapping[str, LayerPlan]

    def params(self) -> int:
        """Parameters of the block linears that are kept, biases included."""
        return sum(layer.params() for layer in self.layers.values())

    def macs(self, tokens: int = 1) -> int:
        """Multiply-adds of the block linears for so many tokens."""
        return tokens * sum(layer.rows.numel() * layer.cols.numel() for layer in self.layers.values())

    def dense_params(self) -> int:
        """Parameters of the block linears before anything was removed."""
        return sum(layer.dense_params() for layer in self.layers.values())

    def dense_macs(self, tokens: int = 1) -> int:
        """Multiply-adds of the block linears before anything was removed."""
        return tokens * sum(layer.out_features * layer.in_features for layer in self.layers.values())

    def sparsity(self, cost: str = "params") -> float:
        """Share of the block linears' parameters ("params") or multiply-adds ("macs") that is gone. ValueError for
        another cost.
        """
        if cost not in COSTS:
            raise ValueError(f"sparsity: cost must be one of {COSTS} (got {cost!r})")
        kept, dense = (self.params(), self.dense_params()) if cost == "params" else (self.macs(), self.dense_macs())
        return 1.0 - kept / dense

    def to_dict(self) -> dict[str, Any]:
        """Plain data. Kept indices as a hexadecimal bitmap (bit i of byte i // 8, lowest first) or "all"."""
        layers = {
            name: {
                "shape": [p.out_features, p.in_features],
                "bias": p.bias,
                "rows": _to_bitmap(p.rows, p.out_features),
                "cols": _to_bitmap(p.cols, p.in_features),
            }
            for name, p in self.layers.items()
        }
        return {"format": FORMAT, "layers": layers}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`. ValueError names the layer and what is wrong with it."""
        if not isinstance(data, Mapping) or not isinstance(data.get("layers"), Mapping):
            raise ValueError("plan: must be a mapping with 'format' and 'layers'")
        if data.get("format") != FORMAT:
            raise ValueError(f"plan: format must be {FORMAT} (got {data.get('format')!r})")
        layers = {}
        for name, entry in data["layers"].items():
            out_features, in_features, rows, cols, bias = _fields(name, entry)
            rows = _from_bitmap(rows, out_features, f"layer {name!r}: rows")
            cols = _from_bitmap(cols, in_features, f"layer {name!r}: cols")
            layers[name] = LayerPlan(rows, cols, out_features, in_features, bias)
        return cls(layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"Plan({len(self.layers)} layers, {self.params():,} of {self.dense_params():,} block parameters)"


def _fields(name: str, entry: Any) -> tuple[int, int, Any, Any, bool]:
    """out_features, in_features, rows, cols and bias of a layer's plain data, types checked."""
    try:
        out_features, in_features = shape = entry["shape"]
        rows, cols, bias = entry["rows"], entry["cols"], entry["bias"]
        if not all(type(n) is int and 0 < n <= MOST_CHANNELS for n in shape):
            raise ValueError(f"shape is {shape}")
        if not isinstance(bias, bool):
            raise ValueError(f"bias is {bias!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"plan: layer {name!r} needs shape [out, in], bias, rows and cols ({error})") from None
    return out_features, in_features, rows, cols, bias


def _to_bitmap(index: Tensor, size: int) -> str:
    if index.numel() == size:
        return "all"
    bits = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device="cpu")
    bits[index] = 1
    weights = 1 << torch.arange(8, dtype=torch.uint8, device="cpu")
    return bytes((bits.view(-1, 8) * weights).sum(1).to(torch.uint8).tolist()).hex()


def _from_bitmap(text: Any, size: int, what: str) -> Tensor:
    if text == "all":
        return torch.arange(size, device="cpu")
    try:
        data = bytes.fromhex(text)
    except (TypeError, ValueError):
        raise ValueError(f"plan: {what} must be 'all' or a hexadecimal bitmap (got {str(text)[:40]!r})") from None
    if len(data) != -(-size // 8):
        raise ValueError(f"plan: {what} must hold {-(-size // 8)} bytes for {size} channels (got {len(data)})")
    packed = torch.tensor(list(data), dtype=torch.uint8, device="cpu")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
    index = bits.flatten().nonzero().flatten()
    if index.numel() and int(index[-1]) >= size:
        raise ValueError(f"plan: {what} keeps channel {int(index[-1])}, but there are {size}")
    return index


def from_kept(table: Table, kept: Mapping[str, Tensor]) -> Plan:
    """The plan of a table whose groups are kept as `kept` says (bool by carrier; absent: all)."""
    layers = {}
    for name, (rows, cols) in table.indices(kept).items():
        layer = table.layers[name]
        layers[name] = LayerPlan(rows, cols, layer.rows, layer.cols, layer.bias)
    return Plan(layers)


def dense_sizes(data: Any) -> list[int]:
    """Rows and columns that the layers of a plan had, of plain data as it lies in a file; what is none is skipped."""
    layers = data.get("layers") if isinstance(data, Mapping) else None
    entries = layers.values() if isinstance(layers, Mapping) else ()
    shapes = [entry.get("shape") for entry in entries if isinstance(entry, Mapping)]
    sizes = [n for shape in shapes if isinstance(shape, list) for n in shape]
    return [n for n in sizes if type(n) is int and 0 < n <= MOST_CHANNELS]


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """What was kept of a compact model that has no config of transformers to say so."""
    vars(model)[_KEY] = plan


def masks_of(model: nn.Module) -> dict[str, ChannelMask]:
    """Channel masks by the module name of their carrier."""
    return {
        name: module.mask
        for name, module in model.named_modules()
        if isinstance(module, MaskedDoRALinear) and module.mask is not None
    }


def plan(model: nn.Module) -> Plan:
    """What the masks of an attached model keep now, `finalize`d or not; of a compact model, what was kept.

    ValueError for a model that is neither. Wrappers around it are treated as by `compact`.
    """
    model = unwrapped(model, "plan")
    if any(isinstance(m, MaskedDoRALinear) for m in model.modules()):
        return from_kept(families.of(model).table(model), {c: m.kept() for c, m in masks_of(model).items()})
    own: Plan | None = vars(model).get(_KEY)
    if own is not None:
        return own
    stored: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    # The config alone does not make a model compact: `from_config` builds a dense one of it.
    compact = any(isinstance(m, CompactLinear) for m in model.modules())
    if compact and (isinstance(stored, dict) or hasattr(stored, "parsed")):
        kept: Plan = Plan.from_dict(stored.get("plan", {})) if isinstance(stored, dict) else stored.parsed()
        return kept
    raise ValueError(f"plan: {type(model).__name__} has no masked layers; call prunekern.attach(model, config) first")


def check(plan: Plan, table: Table) -> None:
    """ValueError unless `plan` fits the architecture: its layers, shapes, and which channels fall together."""
    missing = sorted(set(table.layers) ^ set(plan.layers))
    if missing:
        where = "the plan" if missing[0] in table.layers else "the model"
        raise ValueError(f"plan: layer {missing[0]!r} is not in {where}; this plan is for another model")
    for name, layer in table.layers.items():
        p = plan.layers[name]
        if (p.out_features, p.in_features, p.bias) != (layer.rows, layer.cols, layer.bias):
            raise ValueError(
                f"plan: layer {name!r} must be [{layer.rows}, {layer.cols}], bias {layer.bias} "
                f"(got [{p.out_features}, {p.in_features}], bias {p.bias})"
            )
    kept = {}
    for carrier, group in table.groups.items():
        alive = torch.zeros(table.layers[carrier].rows, dtype=torch.bool, device="cpu")
        alive[plan.layers[carrier].rows] = True
        kept[carrier] = alive[group.rows].all(1)
        _refuse_split(carrier, group.rows, alive)
    for name, (rows, cols) in table.indices(kept).items():
        p = plan.layers[name]
        for side, want, got in (("rows", rows, p.rows), ("cols", cols, p.cols)):
            if not torch.equal(want, got):
                raise ValueError(
                    f"plan: {side} of layer {name!r} do not match the channel groups they fall with "
                    f"(expected {want.numel()} kept, got {got.numel()})"
                )


def _refuse_split(carrier: str, rows: Tensor, alive: Tensor) -> None:
    """Rotary pairs, and the same pair in all query heads of a key/value head, go together or not at all."""
    some = alive[rows].any(1) & ~alive[rows].all(1)
    if some.any():
        group = rows[int(some.nonzero()[0])]
        kept, gone = int(group[alive[group]][0]), int(group[~alive[group]][0])
        raise ValueError(
            f"plan: rows of layer {carrier!r} split a channel group: row {kept} is kept, row {gone} is not "
            f"(rows {group.tolist()} belong together)"
        )
