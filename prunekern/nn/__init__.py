"""Modules that hold parameters and call one op. Needs torch only."""

from .channel_mask import ChannelMask
from .compact_attention import CompactAttention
from .compact_linear import CompactLinear
from .compact_mlp import CompactMLP, mlp_call
from .indexed import pick_channels, place_channels
from .masked_dora_linear import MaskedDoRALinear
from .shrunk import ShrunkDoRALinear, ShrunkLinear, shrink_linear

__all__ = [
    "ChannelMask",
    "CompactAttention",
    "CompactLinear",
    "CompactMLP",
    "MaskedDoRALinear",
    "ShrunkDoRALinear",
    "ShrunkLinear",
    "mlp_call",
    "pick_channels",
    "place_channels",
    "shrink_linear",
]
