"""Ops of the torch.library namespace `prunekern`, one file each; importing this registers them all."""

from .compact_linear import compact_linear, pack_weight, unpack_weight
from .dora_gain import dora_gain, row_sqnorm
from .dora_linear import dora_linear
from .dora_merge import dora_merge

__all__ = [
    "compact_linear",
    "dora_gain",
    "dora_linear",
    "dora_merge",
    "pack_weight",
    "row_sqnorm",
    "unpack_weight",
]
