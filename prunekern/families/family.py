"""What a family is: what prunekern asks of an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from .linears import Make
from .table import Table

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Block(Protocol):
    """Module names of the linears that the blocks of every family have."""

    @property
    def q(self) -> str: ...
    @property
    def k(self) -> str: ...
    @property
    def v(self) -> str: ...
    @property
    def o(self) -> str: ...
    @property
    def up(self) -> str: ...
    @property
    def down(self) -> str: ...


class KeptLayer(Protocol):
    """What a plan says of one linear: kept rows and columns (sorted int64) of its dense [out_features, in_features]."""

    @property
    def rows(self) -> Tensor: ...
    @property
    def cols(self) -> Tensor: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


class Kept(Protocol):
    """A plan, as a family reads it: its layers by module name."""

    @property
    def layers(self) -> Mapping[str, KeptLayer]: ...


@dataclass(frozen=True)
class StockConfig:
    """What a config of transformers itself can say of a model with fewer heads and FFN channels.

    heads, kv_heads: of the dense model. has_head_dim: whether the width of a head is a number of its own in the config;
    where it is derived from the number of heads, all of these stay. head_counts: how many key/value heads a smaller
    config may name, ascending, the dense number last. ffn_field: the config's name for the width of the FFN.
    """

    heads: int
    kv_heads: int
    has_head_dim: bool
    head_counts: tuple[int, ...]
    ffn_field: str = "intermediate_size"


class Family(Protocol):
    """A module of `families/encoders` or `families/decoders`, one for each kind of block."""

    def table(self, model: PreTrainedModel) -> Table:
        """Layers and channel groups of a dense, masked or shrunk model. ValueError for a config not supported."""
        ...

    def blocks(self, model: PreTrainedModel) -> Sequence[tuple[nn.Module, Block]]:
        """The blocks, and what their linears are called, in the order they run."""
        ...

    def rebuild(self, model: PreTrainedModel, plan: Kept, make: Make) -> None:
        """Turn every block into a compact one, in place: `make` gives the linear that takes a layer's place."""
        ...

    def stock(self, config: Any) -> StockConfig:
        """What transformers' own config can say of such a model."""
        ...

    def most_tokens(self, config: PretrainedConfig) -> int | None:
        """The longest sequence the model has positions for; None where there is no limit."""
        ...


class FusedFamily(Family, Protocol):
    """A family some of whose linears are fused in transformers' models; `families.split` gives their parts names."""

    def fused(self, model: PreTrainedModel) -> Mapping[str, Mapping[str, int]]:
        """Module names of fused linears -> names of their parts, and how many rows each has, in order."""
        ...
