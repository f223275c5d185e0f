"""The channel groups of a block that prunekern does not know, told by the module names of its linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .table import Group, Layer, channels

INTERLEAVED = "interleaved"


@dataclass(frozen=True)
class OwnGroup:
    """What the functions below return, for `register`. `{}` in its names stands for one part of a module name."""

    maker: ClassVar[str]
    linears: ClassVar[tuple[str, ...]]  # the fields that are names

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for field, name in self.names.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"{self.maker}: {field} must be the name of a module (got {name!r})")
            if name in seen:
                raise ValueError(
                    f"{self.maker}: {field} must be another layer than {seen[name]} (got {name!r} for both); one "
                    "linear for several purposes has to be split first"
                )
            seen[name] = field
        if len({name.count("{}") for name in self.names.values()}) > 1:
            raise ValueError(f"{self.maker}: all names must have as many {{}} (got {[*self.names.values()]})")

    @property
    def names(self) -> dict[str, str]:
        """Module names by argument."""
        return {field: name for field in self.linears if (name := getattr(self, field)) is not None}

    def filled(self, parts: tuple[str, ...]) -> OwnGroup:
        """The same with its `{}` filled in."""

        def fill(name: str) -> str:
            first, *rest = name.split("{}")
            return first + "".join(part + after for part, after in zip(parts, rest, strict=True))

        return replace(self, **{field: fill(name) for field, name in self.names.items()})

    def groups(self, layers: Mapping[str, Layer]) -> list[Group]:
        """The channel groups. ValueError where the shapes of these layers do not fit."""
        raise NotImplementedError

    def packed(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers whose kept rows, and those whose kept columns, stand side by side when compact. All others write to,
        and read from, as many channels as before.
        """
        return (), ()

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.maker}({', '.join(f'{name}={value!r}' for name, value in given)})"

    def refuse(self, why: str) -> Any:
        """Raise the ValueError that says so."""
        raise ValueError(f"{self}: {why}")


@dataclass(frozen=True)
class MlpGroup(OwnGroup):
    maker = "mlp_group"
    linears = ("up", "gate", "down")

    up: str
    down: str
    gate: str | None = None
    full_width: bool = False

    def groups(self, layers: Mapping[str, Layer]) -> list[Group]:
        n = layers[self.up].rows
        if layers[self.down].cols != n:
            self.refuse(f"down must read the {n} rows of up (got {layers[self.down].cols} columns)")
        if self.gate is not None and layers[self.gate].rows != n:
            self.refuse(f"gate must have the {n} rows of up (got {layers[self.gate].rows})")
        every = channels(n)
        gate = {} if self.gate is None else {self.gate: every}
        return [Group("ffn", self.up, every, gate, removed_cols={self.down: every})]

    def packed(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if self.full_width:
            return (), ()
        return (self.up,) if self.gate is None else (self.up, self.gate), (self.down,)


@dataclass(frozen=True)
class AttentionGroup(OwnGroup):
    maker = "attention_group"
    linears = ("q", "k", "v", "o")

    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int | None = None
    rotary: bool | str = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, n in (("heads", self.heads), ("kv_heads", self.kv_heads)):
            if (n is not None or field == "heads") and (type(n) is not int or n < 1):
                raise ValueError(f"attention_group: {field} must be a positive whole number (got {n!r})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"attention_group: kv_heads must divide heads, {self.heads} (got {self.kv_heads})")
        if not isinstance(self.rotary, bool) and self.rotary != INTERLEAVED:
            raise ValueError(f"attention_group: rotary must be False, True or {INTERLEAVED!r} (got {self.rotary!r})")

    def groups(self, layers: Mapping[str, Layer]) -> list[Group]:
        q, k, v, o = (layers[name] for name in (self.q, self.k, self.v, self.o))
        kv = self.heads if self.kv_heads is None else self.kv_heads
        if q.rows % self.heads:
            self.refuse(f"heads must divide the {q.rows} rows of q (got {self.heads})")
        d, shared = q.rows // self.heads, self.heads // kv
        if k.rows != kv * d:
            self.refuse(f"k must have {kv * d} rows, {d} for each of {kv} heads (got {k.rows})")
        if v.rows % kv:
            self.refuse(f"v must have as many rows for each of {kv} heads (got {v.rows})")
        width = v.rows // kv
        if o.cols != self.heads * width:
            self.refuse(
                f"o must read {self.heads * width} channels, {width} of each of {self.heads} heads (got {o.cols})"
            )
        if self.rotary and d % 2:
            self.refuse(f"rotary needs heads of an even width (got {d})")
        kv_head = torch.arange(kv, device="cpu")
        query_head = kv_head[:, None] * shared + torch.arange(shared, device="cpu")  # [kv, shared]
        unit = self._units(d)  # [units, n]: the channels of a head that go together
        in_k = (kv_head[:, None, None] * d + unit).reshape(-1, unit.shape[1])  # [kv * units, n]
        in_q = (query_head[:, None, :, None] * d + unit[:, None, :]).reshape(-1, shared * unit.shape[1])
        every = torch.arange(width, device="cpu")
        in_o = (query_head[:, None, :] * width + every[:, None]).reshape(-1, shared)  # [kv * width, shared]
        head = kv_head.repeat_interleave(len(unit))
        return [
            Group("query_key", self.q, in_q, {self.k: in_k}, head=head, lives_by=self.v),
            Group(
                "value", self.v, channels(v.rows), removed_cols={self.o: in_o}, head=kv_head.repeat_interleave(width)
            ),
        ]

    def _units(self, d: int) -> Tensor:
        if not self.rotary:
            return channels(d)
        if self.rotary == INTERLEAVED:
            return torch.arange(d, device="cpu").view(-1, 2)
        return torch.arange(d, device="cpu").view(2, -1).T


@dataclass(frozen=True)
class ResidualGroup(OwnGroup):
    maker = "residual_group"
    linears = ("layer",)

    layer: str

    def groups(self, layers: Mapping[str, Layer]) -> list[Group]:
        return [Group("residual", self.layer, channels(layers[self.layer].rows))]


def mlp_group(up: str, down: str, gate: str | None = None, full_width: bool = False) -> OwnGroup:
    """The hidden channels of an MLP, y = down(act(up(x))), or down(act(gate(x)) * up(x)): row j of `up` and of `gate`,
    and column j of `down`, fall together.

    What lies between must keep a zero a zero and act channel by channel: GELU, ReLU, SiLU and tanh do, and dropout;
    sigmoid does not, nor does a layer norm or a softmax. With a gate, a zero of `up` must make the product zero. Nobody
    can see that in the names: `check` finds out.

    up, gate, down: module names of `nn.Linear`s, [n, in], [n, in] and [out, n]. In a chain, one's `down` may be
    another's `up`. full_width: False has the compact model compute the kept channels alone, side by side. True puts
    them back in their places among zeros, for code between `up` and `down` that knows n: a factor for each channel, a
    convolution of each channel.
    """
    return MlpGroup(up, down, gate, full_width)


def attention_group(
    q: str, k: str, v: str, o: str, heads: int, kv_heads: int | None = None, rotary: bool | str = False
) -> OwnGroup:
    """The channels of an attention's heads: a query channel and the key channel that meets it fall together, and so do
    a value channel and the columns of `o` that read it. A head without any value channel loses its queries and keys.

    The attention goes on with heads of one width: q, k and v put their kept channels among zeros, `o` reads the kept
    ones, and no other code changes. What is saved are the multiply-adds of the four linears. Between the linears
    channels must meet as in softmax(q k^T) v, with whatever scale, mask or bias on the logits; a norm over the channels
    of a query or key head mixes them, and needs `mlp_group(v, o, full_width=True)` in place of this. `check` finds out.

    q, k, v, o: module names of `nn.Linear`s; one linear for all of q, k and v has to be split first. heads: of the
    queries, [heads * d, in]. kv_heads: of keys and values where they are fewer; query head h reads key/value head
    h // (heads / kv_heads). rotary: True where channels j and j + d / 2 of a head are turned together, "interleaved"
    where 2j and 2j + 1 are; all of a head's must be.
    """
    return AttentionGroup(q, k, v, o, heads, kv_heads, rotary)


def residual_group(layer: str) -> OwnGroup:
    """The output channels of `layer`, one by one: the compact layer makes the kept ones, and the others are zero. For
    what is added to a residual stream, whose width stays; right for any linear.
    """
    return ResidualGroup(layer)
