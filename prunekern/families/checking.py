"""Whether the groups that a class is registered with are those of its forward pass: tried out, as no name can tell."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import CompactLinear, MaskedDoRALinear
from .groups import OwnGroup
from .own import Own, keep_off_fast_path, made, put, registered
from .table import Group, Table

# max |difference| relative to max |value|. A channel that is counted wrongly is about a share of one in so many.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_NARROW = 2e-2  # of outputs in 16 bits


@dataclass(frozen=True)
class _KeptLayer:
    rows: Tensor
    cols: Tensor
    out_features: int
    in_features: int


@dataclass(frozen=True)
class _Kept:
    layers: dict[str, _KeptLayer]


@torch.no_grad()
def check(model: nn.Module, *inputs: Any, **kwargs: Any) -> None:
    """Find out whether the groups a class is registered with are right: ValueError for the first that is not.

    model: dense, of a registered class; it is left alone. inputs, kwargs: what it is called with. Of a copy in eval
    mode and float64 (or in fp32, where it runs in no other), with random numbers in the linears of the groups, half of
    each group's channels are pruned, and one head's values: as masks do, by rows of zeros, and as `compact` does, by
    leaving them out. Both must give the same. So the channels must reach the output: a query/key channel does with two
    tokens or more, a block that these inputs are not routed through does not. Each linear must be called: where a model
    reads `linear.weight` itself, masks and adapters are passed by.

    ValueError besides for a class that is not registered, a model that is attached or compact already, and what
    `attach` refuses.
    """
    own = registered(type(model))
    if own is None:
        raise ValueError(f"check: {type(model).__name__} is not registered; see prunekern.families.register")
    if any(isinstance(module, (MaskedDoRALinear, CompactLinear)) for module in model.modules()):
        raise ValueError("check: model must be dense (it is attached, or compact, already)")
    table = own.table(model)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        twin, run = _random_twin(model, table, inputs, kwargs)
        _check_called(own, twin, run, table)
        whole = run()
        for one in own.named(twin):
            for group in one.groups(table.layers):
                for alive in _choices(group):
                    _check_group(own, twin, run, whole, one, group, alive, table)
    own.is_checked = True


def _check_called(own: Own, twin: nn.Module, run: Callable[[], list[Tensor]], table: Table) -> None:
    called: set[nn.Module] = set()
    linears = {name: twin.get_submodule(name) for name in table.layers}
    hooks = [linear.register_forward_hook(lambda module, *_: called.add(module)) for linear in linears.values()]
    run()
    for hook in hooks:
        hook.remove()
    for name, linear in linears.items():
        if linear not in called:
            raise ValueError(
                f"check: {own.cls.__name__}: layer {name!r} is not called with these inputs; give others, or call it "
                "where the model reads its weight itself: masks and adapters would be passed by"
            )


def _choices(group: Group) -> Iterator[Tensor]:
    """Which of the channels are kept, bool [count]: half of them; and of values all but those of the first head, whose
    queries and keys then go, too.
    """
    alive = torch.zeros(group.count, dtype=torch.bool, device="cpu")
    alive[torch.randperm(group.count, device="cpu")[: group.count // 2]] = True
    yield alive
    if group.kind == "value":
        yield group.heads > 0


def _check_group(
    own: Own, twin: nn.Module, run: Callable[[], list[Tensor]], whole: list[Tensor], one: OwnGroup, group: Group,
    alive: Tensor, table: Table,
) -> None:  # fmt: skip
    names = [*one.names.values()]
    linears = {name: twin.get_submodule(name) for name in names}
    rows, cols = one.packed()
    what = f"{own.cls.__name__}: {one} ({group.kind} channels)"
    carrier: Any = linears[group.carrier]
    gone = group.rows[~alive].flatten().to(carrier.weight.device)
    before = [(tensor, tensor.clone()) for tensor in (carrier.weight, carrier.bias) if tensor is not None]
    for tensor, _ in before:
        tensor[gone] = 0
    masked = run()
    if _difference(masked, whole) == 0:
        raise ValueError(f"check: {what}: nothing of it reaches the output with these inputs; give others")
    kept = _Kept({})
    for name, (own_rows, own_cols) in table.indices({group.carrier: alive}).items():
        kept.layers[name] = _KeptLayer(own_rows, own_cols, table.layers[name].rows, table.layers[name].cols)

    def make(
        name: str, in_index: Tensor | None, out_index: Tensor | None, out_features: int, activation: str
    ) -> CompactLinear:
        dense: Any = linears[name]
        weight = dense.weight[kept.layers[name].rows][:, kept.layers[name].cols]
        bias = None if dense.bias is None else dense.bias[kept.layers[name].rows]
        return CompactLinear(weight, bias, in_index, out_index, out_features, activation).to(weight.device)

    try:
        for name in names:
            put(twin, name, made(kept, name, make, name in rows, name in cols))
        try:
            compact = run()
        except (RuntimeError, ValueError, IndexError) as error:
            said = " ".join(str(error).split())
            hint = "; full_width=True keeps the width" if one.maker == "mlp_group" and rows else ""
            raise ValueError(f"check: {what}: the model does not run without pruned channels ({said}){hint}") from error
    finally:
        for name, linear in linears.items():
            put(twin, name, linear)
        for tensor, values in before:
            tensor.copy_(values)
    difference = _difference(compact, masked)
    if not difference <= max(TOLERANCE.get(tensor.dtype, _NARROW) for tensor in compact):
        raise ValueError(
            f"check: {what}: the model is another one without its pruned channels (outputs differ by {difference:.1e} "
            "of the largest): what lies between these linears mixes channels, or makes something of a zero"
        )


def _random_twin(
    model: nn.Module, table: Table, inputs: Any, kwargs: Any
) -> tuple[nn.Module, Callable[[], list[Tensor]]]:
    """A copy with random linears, and what calls it."""
    for dtype in (torch.float64, torch.float32):
        twin = copy.deepcopy(model).to(dtype).eval()
        keep_off_fast_path(twin)
        for name in table.layers:
            linear: Any = twin.get_submodule(name)
            linear.weight.copy_(
                torch.randn(linear.weight.shape, dtype=dtype, device="cpu") / max(linear.weight.shape[1], 1) ** 0.5
            )
            if linear.bias is not None:
                linear.bias.copy_(torch.randn(linear.bias.shape, dtype=dtype, device="cpu"))
        given = _cast((inputs, kwargs), dtype)

        def run(twin: nn.Module = twin, given: Any = given) -> list[Tensor]:
            torch.manual_seed(0)  # whatever is drawn in eval mode
            args, named = copy.deepcopy(given)
            out = [tensor for tensor in _tensors(twin(*args, **named)) if tensor.is_floating_point()]
            if not any(tensor.numel() for tensor in out):
                raise ValueError(f"check: {type(model).__name__} must return floating-point tensors (got none)")
            return out

        try:
            run()
        except RuntimeError:
            if dtype == torch.float32:
                raise
        else:
            break
    return twin, run


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """All within what a model returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def _difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest of all outputs, each relative to its largest finite value; infinite where shapes differ, or one has
    an infinity or NaN where the other has not.
    """
    worst = 0.0
    for one, other in zip(got, want, strict=True):
        if one.shape != other.shape:
            return float("inf")
        same = (one == other) | (one.isnan() & other.isnan())
        if bool(same.all()):
            continue
        finite = other[other.isfinite()].abs()
        scale = max(float(finite.max()) if finite.numel() else 0.0, torch.finfo(other.dtype).tiny)
        difference = float((one - other).abs().masked_fill(same, 0).max()) / scale
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst
