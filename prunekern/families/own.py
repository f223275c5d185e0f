"""Models of one's own: classes that are registered with the channel groups of their linears. No block is rebuilt; each
linear is replaced by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from .family import Block, Kept, StockConfig
from .groups import AttentionGroup, OwnGroup
from .linears import Make, dense_layer, full_or
from .table import Group, Layer, Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Groups = Sequence[OwnGroup] | Callable[[Any], Iterable[OwnGroup]]
_KEY = "_prunekern_groups"  # of an attached model, and of what is made of it


class Own:
    """A registered class, as a `Family`."""

    def __init__(self, cls: type[nn.Module], groups: Groups, head: Sequence[str] | None):
        self.cls, self._groups, self._head = cls, groups, head
        self.is_checked = False  # see `check`

    def named(self, model: nn.Module) -> list[OwnGroup]:
        """The groups of this model, no `{}` left. ValueError for names that match no module.

        What was registered is asked of dense models only: who attached one has it remembered.
        """
        known: list[OwnGroup] | None = vars(model).get(_KEY)
        if known is not None:
            return known
        given = [*(self._groups(model) if callable(self._groups) else self._groups)]
        for one in given:
            if not isinstance(one, OwnGroup):
                self._refuse(f"groups must come from mlp_group, attention_group or residual_group (got {one!r})")
        if not given:
            self._refuse("groups must hold at least one (got none)")
        modules = dict(model.named_modules())
        return [filled for one in given for filled in self._filled(one, modules)]

    def _filled(self, one: OwnGroup, modules: Mapping[str, nn.Module]) -> list[OwnGroup]:
        parts: dict[tuple[str, ...], None] = {}
        for name in one.names.values():
            pattern = re.escape(name).replace(r"\{\}", r"([^.]+)")
            found = [match.groups() for module in modules if (match := re.fullmatch(pattern, module))]
            if not found:
                ends = sorted({n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)})
                self._refuse(f"{one}: {name!r} matches no module; linears end in {', '.join(ends) or 'nothing'}")
            parts |= dict.fromkeys(found)
        filled = [one.filled(each) for each in parts]
        for each in filled:
            for name in each.names.values():
                if name not in modules:
                    self._refuse(f"{each}: there is no module {name!r}")
        return filled

    def remember(self, model: nn.Module) -> None:
        """An attached model keeps its groups; see `named`."""
        vars(model)[_KEY] = self.named(model)
        keep_off_fast_path(model)

    def layers(self, model: nn.Module) -> list[str]:
        """Module names of the linears, each once, in the order of the groups."""
        return [*dict.fromkeys(name for one in self.named(model) for name in one.names.values())]

    def table(self, model: nn.Module) -> Table:
        """As `Family.table`. ValueError for a layer that is no linear of its own, and for groups that overlap."""
        named, names = self.named(model), self.layers(model)
        if _KEY not in vars(model):
            self._check_linears(model, names)
        layers: dict[str, Layer] = {name: dense_layer(model, name) for name in names}
        by_carrier: dict[str, Group] = {}
        governed: dict[tuple[str, str], OwnGroup] = {}
        for one in named:
            for group in one.groups(layers):
                rows, cols = (group.carrier, *group.removed_rows), tuple(group.removed_cols)
                for side in [("rows", name) for name in rows] + [("columns", name) for name in cols]:
                    if side in governed:
                        self._refuse(
                            f"{side[0]} of layer {side[1]!r} belong to one group only (got {governed[side]} and {one})"
                        )
                    governed[side] = one
                by_carrier[group.carrier] = group
        return Table(layers, by_carrier)

    def _check_linears(self, model: nn.Module, names: Iterable[str]) -> None:
        """ValueError unless each is a plain `nn.Linear` that stands in one place and shares no weight."""
        places, owners = defaultdict(list), defaultdict(list)
        for path, module in model.named_modules():
            for child, inner in module._modules.items():
                places[id(inner)].append(f"{path}.{child}".lstrip("."))
            for leaf, parameter in module._parameters.items():
                owners[id(parameter)].append(f"{path}.{leaf}".lstrip("."))
        for name in names:
            module = model.get_submodule(name)
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                self._refuse(f"layer {name!r} must be a torch.nn.Linear (got {kind})")
            if "weight" not in module._parameters:
                self._refuse(f"layer {name!r} must hold its weight as a parameter: take its parametrisation off first")
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                self._refuse(
                    f"layer {name!r} is part of a MultiheadAttention, which reads its weight and never calls it"
                )
            if len(places[id(module)]) > 1:
                self._refuse(f"layer {name!r} must stand in one place (got {', '.join(places[id(module)])})")
            shared = owners[id(module._parameters["weight"])]
            if len(shared) > 1:
                self._refuse(f"layer {name!r} must have a weight of its own (got one shared by {', '.join(shared)})")

    def head(self, model: nn.Module) -> list[nn.Parameter] | None:
        """What is trained besides the adapters; None where nothing was said. ValueError for names that are none, and
        for layers of the table.
        """
        if self._head is None:
            return None
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        layers = self.layers(model)
        found: dict[int, nn.Parameter] = {}
        for name in self._head:
            if name not in modules and name not in parameters:
                self._refuse(f"head: there is no module or parameter {name!r}")
            inside = [layer for layer in layers if f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}.")]
            if inside or not name:
                self._refuse(
                    f"head: {name!r} holds {min(inside or layers)!r}, which is adapted and stays frozen itself"
                )
            chosen = [parameters[name]] if name in parameters else modules[name].parameters()
            found |= {id(parameter): parameter for parameter in chosen}
        return [*found.values()]

    def blocks(self, model: nn.Module) -> list[tuple[nn.Module, Block]]:
        """None that are known."""
        return []

    def rebuild(self, model: nn.Module, plan: Kept, make: Make) -> None:
        """Put each linear's compact one in its place, in place."""
        named = self.named(model)
        rows = {name for one in named for name in one.packed()[0]}
        cols = {name for one in named for name in one.packed()[1]}
        for name in self.layers(model):
            put(model, name, made(plan, name, make, name in rows, name in cols))
        keep_off_fast_path(model)

    def stock(self, config: PretrainedConfig | None) -> StockConfig:
        """ValueError: it is no architecture of transformers' own."""
        raise ValueError(
            f"{self.cls.__name__} is registered with prunekern.families.register: what transformers loads by its own "
            "class and config (rule 'stock', save_stock) is for the architectures that prunekern knows"
        )

    def heads(self, model: nn.Module) -> int | None:
        """Query heads of an attention, where all have as many."""
        heads = {one.heads for one in self.named(model) if isinstance(one, AttentionGroup)}
        return heads.pop() if len(heads) == 1 else None

    def most_tokens(self, config: PretrainedConfig) -> int | None:
        """As `Family.most_tokens`: what most configs call it."""
        most: int | None = getattr(config, "max_position_embeddings", None)
        return most

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.cls.__name__}, as registered: {why}")


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """In the place of the module of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def made(plan: Kept, name: str, make: Make, packs_rows: bool, packs_cols: bool) -> nn.Module:
    """What `make` gives for a layer whose kept rows and columns stand side by side, or in their old places."""
    kept = plan.layers[name]
    if packs_rows:
        out_index, out_features = None, kept.rows.numel()
    else:
        out_index, out_features = full_or(kept.rows, kept.out_features), kept.out_features
    in_index = None if packs_cols else full_or(kept.cols, kept.in_features)
    return make(name, in_index, out_index, out_features, "none")


def keep_off_fast_path(model: nn.Module) -> None:
    """PyTorch's own encoder layers read weights past their modules in eval mode, where they find nothing unusual: they
    are told that their activation is an unusual one. It is called all the same.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


_registered: dict[type, Own] = {}


def register(cls: type[nn.Module], groups: Groups, *, head: Sequence[str] | None = None) -> None:
    """Tell prunekern which linears of a model class of your own it may prune, and which channels fall together.

    Models of `cls` and of its subclasses (of several registered classes the nearest counts) can then be attached,
    trained, compacted, saved and loaded. Their forward pass stays yours. Only the linears that are named get adapters,
    and all else is frozen.

    cls: a class of `nn.Module`s, or of transformers models that prunekern has no family for.
    groups: what `mlp_group`, `attention_group` and `residual_group` return, in a list, or made by a function of the
        dense model. In their module names, as of `model.named_modules()`, `{}` stands for one part: "layers.{}.fc1" is
        that linear of every layer.
    head: names of modules or parameters that are trained, too, at the rate of the adapters. None: nothing of a plain
        model; of a transformers model what lies outside its base model.

    ValueError or TypeError naming the argument: here for a class that is registered already or that prunekern knows;
    by `attach` for names that match nothing, layers that are no `nn.Linear`, stand in two places or share their weight,
    shapes that do not fit, and groups that overlap.
    """
    from . import FILES

    if not isinstance(cls, type) or not issubclass(cls, nn.Module) or cls is nn.Module:
        raise TypeError(f"register: cls must be a class of torch.nn.Module's (got {cls!r})")
    if cls in _registered:
        raise ValueError(f"register: {cls.__name__} is registered already; unregister it first")
    model_type = getattr(getattr(cls, "config_class", None), "model_type", None)
    if model_type in FILES:
        raise ValueError(f"register: prunekern knows {cls.__name__} already, as {model_type!r}")
    if not callable(groups):
        if isinstance(groups, OwnGroup) or not isinstance(groups, Iterable):
            raise TypeError(f"register: groups must be a list, or a function of the model (got {groups!r})")
        groups = [*groups]
        for one in groups:
            if not isinstance(one, OwnGroup):
                raise TypeError(
                    f"register: groups must come from mlp_group, attention_group or residual_group (got {one!r})"
                )
    if head is not None and (isinstance(head, str) or not all(isinstance(name, str) for name in head)):
        raise TypeError(f"register: head must be a list of names (got {head!r})")
    _registered[cls] = Own(cls, groups, None if head is None else [*head])


def unregister(cls: type[nn.Module]) -> None:
    """Forget what `register` was told of this class. ValueError where it was told nothing."""
    if _registered.pop(cls, None) is None:
        raise ValueError(f"unregister: {cls!r} is not registered")


def registered(cls: type) -> Own | None:
    """What is registered of the class, or of the nearest one that it is made from; None where nothing is."""
    return next((_registered[base] for base in cls.__mro__ if base in _registered), None)


def registered_as(name: str) -> type[nn.Module] | None:
    """The registered class of that name; None where there is none."""
    return next((cls for cls in _registered if cls.__name__ == name), None)
