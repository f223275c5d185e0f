"""Ops of the torch.library namespace `prunekern`, one file each; importing this registers them all."""

from . import versions  # noqa: F401  (counts the steps of optimisers)
from .compact_attention import compact_attention
from .compact_linear import compact_linear
from .compact_mlp import compact_mlp
from .disentangled_attention import disentangled_attention
from .dora_gain import dora_gain, row_sqnorm
from .dora_linear import dora_linear
from .dora_merge import dora_merge
from .int4 import dequantize_weight_int4, quantize_weight_int4
from .packing import dequantize_weight, pack_weight, quantize_weight, unpack_weight
from .quantized import quantize_rows
from .rms_norm import rms_norm
from .rotate_pairs import rotate_pairs

__all__ = [
    "compact_attention",
    "compact_linear",
    "compact_mlp",
    "dequantize_weight",
    "dequantize_weight_int4",
    "disentangled_attention",
    "dora_gain",
    "dora_linear",
    "dora_merge",
    "pack_weight",
    "quantize_rows",
    "quantize_weight",
    "quantize_weight_int4",
    "rms_norm",
    "rotate_pairs",
    "row_sqnorm",
    "unpack_weight",
]
