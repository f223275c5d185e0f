"""Weights of compact layers in memory: their four kinds, and the panels that the C++ kernels read."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from prunekern import _native

from . import calls, checks
from .int4 import GROUP, groups_of
from .seen import version_of as version_of
from .watched import WatchedParameter

# The kinds a weight is held in. The dtype tells which: of a plain weight as of its panels. A plain weight is [N, K],
# one of int4 [N, 16 ceil(K / 32)] with its scale: see `quantize_weight_int4`.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
WEIGHTS = tuple(DTYPES)
KIND = {dtype: kind for kind, dtype in DTYPES.items()}
_AVAILABLE = _native.available()
_PLAIN = (Tensor, torch.nn.Parameter, WatchedParameter)
ELEMENT = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # what the kernels read and write besides weights

HUGE_PAGE = 2**21  # bytes of a huge page
_CHUNK = 16 * HUGE_PAGE


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K], any float dtype -> (q [N, K] int8, scale [N] float32), with weight close to q * scale[:, None].

    scale is the channel's largest |weight| / 127; q is rounded to nearest, ties to even. A channel of zeros, or of
    nothing above 1e-36, has scale 0 and q 0. Raises ValueError for a weight that holds infinities or NaN.
    """
    checks.tensors("quantize_weight", {"weight": weight}, {})
    checks.shape("quantize_weight", "weight", weight, (None, None))
    checks.floating("quantize_weight", "weight", weight)
    weight = weight.detach().float()
    if weight.shape[1] == 0:
        return weight.to(torch.int8), weight.new_zeros(weight.shape[0])
    largest = weight.abs().amax(1)  # [N]
    if not largest.is_meta and not bool(largest.isfinite().all()):
        channel = int((~largest.isfinite()).nonzero()[0])
        raise ValueError(f"quantize_weight: weight must be finite (got {float(largest[channel])} in row {channel})")
    largest = torch.where(largest > 1e-36, largest, 0.0)  # below, 127 / largest is no fp32 number
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (weight * inverse[:, None]).round_().to(torch.int8), largest / 127.0


def dequantize_weight(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """q [N, K] int8 and scale [N] -> the weight [N, K] in `dtype`."""
    return q.to(dtype).mul_(scale.to(dtype)[:, None])


def pack_weight(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Lays weight [N, K] (CPU, any strides) out for this machine's kernels, in panels of w output channels.

    scale: of int4 weights only, whose panels hold it; see `quantize_weight_int4`.

    | weight   | packed                                                                      |
    |----------|-----------------------------------------------------------------------------|
    | float32  | [ceil(N / w), K, w] float32                                                 |
    | bfloat16 | [ceil(N / w), 16 ceil(K / 32), w, 2] bfloat16: consecutive inputs in pairs  |
    | int8     | [ceil(N / w), 4 ceil(K / 16), w, 4] int8: in fours; see `quantize_weight`   |
    | uint8    | [ceil(N / w), ceil(K / 32), 18 w] uint8: int4, a group of 32 inputs at a    |
    |          | time, [4, w, 4] codes and w scales                                          |

    w is 8, 16 or 32 by instruction set; what is missing from the last panel, and from the last 32 or 16 inputs, is
    zero.
    The layout is not portable: save the plain weight. Raises RuntimeError where the C++ core is missing.
    """
    core = _native.core()
    checks.tensors("pack_weight", {"weight": weight}, {})
    checks.shape("pack_weight", "weight", weight, (None, None))
    if weight.dtype not in KIND or weight.device.type != "cpu":
        raise TypeError(
            f"pack_weight: weight must be float32, bfloat16, int8 or uint8 (int4) on cpu (got {weight.dtype} on "
            f"{weight.device})"
        )
    weight = weight.detach().resolve_neg()
    n, k = weight.shape
    calls.has_memory("pack_weight: weight", weight)
    if weight.dtype == torch.uint8:
        return _pack_int4(weight, scale)
    packed = _empty_panels(panel_shape(n, k, weight.dtype), weight.dtype)
    if weight.dtype == torch.float32:
        core.pack_weight(weight.data_ptr(), weight.stride(0), weight.stride(1), n, k, packed.data_ptr())
        return packed
    panels, width = packed.shape[0], packed.shape[2]
    together = packed.shape[3]
    padded = weight.new_zeros(panels * width, packed.shape[1] * together)
    padded[:n, :k] = weight
    steps = packed.shape[1]
    packed.copy_(padded.view(panels, width, steps, together).transpose(1, 2))
    return packed


def _pack_int4(codes: Tensor, scale: Tensor | None) -> Tensor:
    n, groups = codes.shape[0], codes.shape[1] * 2 // GROUP
    check_scale("pack_weight", "scale", codes, n, scale)
    assert scale is not None
    packed = _empty_panels(panel_shape(n, groups * GROUP, torch.uint8), torch.uint8)  # [P, G, 18 w]
    if not packed.numel():
        return packed
    panels, width = packed.shape[0], packed.shape[2] // 18
    if n < panels * width:
        packed[-1].fill_(0x88)  # zeros
    fours = codes.new_full((panels * width, codes.shape[1]), 0x88)
    fours[:n] = codes
    steps = scale.new_zeros(panels * width, groups)
    steps[:n] = scale
    in_fours = fours.view(panels, width, groups, 4, 4).permute(0, 2, 3, 1, 4)  # [P, G, 4, w, 4]
    packed[:, :, : 16 * width] = in_fours.reshape(panels, groups, 16 * width)
    by_group = steps.view(panels, width, groups).transpose(1, 2).contiguous()  # [P, G, w]
    packed[:, :, 16 * width :] = by_group.view(torch.uint8)
    return packed


def unpack_weight(packed: Tensor, n: int, k: int | None = None, scale: Tensor | None = None) -> Tensor:
    """The plain weight [n, k] in float32 of `pack_weight`'s panels. k: needed unless they are float32: others
    pad it. scale: of int8 panels.
    """
    core = _native.core()
    checks.tensors("unpack_weight", {"packed": packed}, {"scale": scale})
    if k is None:
        if packed.dtype != torch.float32:
            raise ValueError(
                f"unpack_weight: k is needed with {KIND.get(packed.dtype, packed.dtype)} panels (got None)"
            )
        k = packed.shape[1] if packed.dim() == 3 else 0
    check_panels("unpack_weight", "packed", packed, n, k)
    check_scale("unpack_weight", "scale", packed, n, scale)
    weight = torch.empty(n, k, dtype=torch.float32, device="cpu")
    scale_address = 0 if scale is None else scale.data_ptr()
    core.unpack_weight(packed.data_ptr(), n, k, weight.data_ptr(), KIND[packed.dtype], scale_address)
    return weight


def panel_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the panels of a weight [n, k] on this machine."""
    width = _native.core().panel_width()
    if dtype == torch.uint8:
        return -(-n // width), groups_of(k), 18 * width
    if dtype == torch.bfloat16:
        return -(-n // width), -(-k // 32) * 16, width, 2
    if dtype == torch.int8:
        return -(-n // width), -(-k // 16) * 4, width, 4
    return -(-n // width), k, width


def plain_shape(n: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of a plain weight [n, k] in memory."""
    return (n, groups_of(k) * GROUP // 2) if dtype == torch.uint8 else (n, k)


def check_plain(op: str, name: str, weight: Tensor, k: int) -> tuple[int, int]:
    """(N, K) of a plain weight; k: the inputs it is given, which says what of an int4 one is no padding. ValueError
    where that cannot be.
    """
    checks.shape(op, name, weight, (None, None))
    if weight.dtype != torch.uint8:
        return weight.shape[0], weight.shape[1]
    if weight.shape[1] != plain_shape(0, k, weight.dtype)[1]:
        most = weight.shape[1] * 2
        raise ValueError(f"{op}: {name} reads {most - GROUP + 1} to {most} inputs, being int4 (got {k})")
    return weight.shape[0], k


def scale_beside(weight: Tensor, scale: Tensor | None) -> Tensor | None:
    """What goes with a weight, plain or packed, of a layer with this scale: panels of int4 hold theirs."""
    return None if weight.dtype == torch.uint8 and is_packed(weight) else scale


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is panels rather than plain [N, K]."""
    return weight.dim() > 2


def is_packable(weight: Tensor) -> bool:
    """Whether `pack_weight` takes a plain weight of this dtype and device on this machine."""
    return weight.dtype in KIND and weight.is_cpu and _AVAILABLE


def may_pack(weight: Tensor) -> bool:
    """Whether a weight can be packed here and now: not while a tracer looks on, whose tensors hold no numbers."""
    return type(weight) in _PLAIN and is_packable(weight) and calls.unwatched()


def is_unchanged(weight: Tensor, address: int, version: int) -> bool:
    """Whether `weight` lies at this address and its version counter says this: less than `seen.Seen` sees."""
    return weight.data_ptr() == address and version_of(weight) == version


def check_panels(op: str, name: str, packed: Tensor, n: int, k: int) -> None:
    """Raises ValueError or TypeError unless `packed` is `pack_weight` of a weight [n, k], made on this machine."""
    core = _native.core()
    width = core.panel_width()
    if packed.dim() not in (3, 4):
        raise ValueError(f"{op}: {name} must be [N, K] or pack_weight's panels (got {list(packed.shape)})")
    if packed.dtype not in KIND or packed.device.type != "cpu" or not packed.is_contiguous():
        raise TypeError(
            f"{op}: {name} must be contiguous float32, bfloat16, int8 or uint8 (int4) on cpu (got {packed.dtype} on "
            f"{packed.device}, strides {packed.stride()})"
        )
    channels = packed.shape[2] // 18 if packed.dtype == torch.uint8 else packed.shape[2]
    if channels != width:
        raise ValueError(
            f"{op}: {name} has panels of {channels} channels, the {core.isa()} kernels read {width}: "
            "pack_weight the plain weight again on this machine"
        )
    checks.shape(op, name, packed, panel_shape(n, k, packed.dtype))


def check_scale(op: str, name: str, weight: Tensor, n: int, scale: Tensor | None) -> None:
    """Raises unless an int8 weight, plain or packed, comes with its scale [n] float32, a plain int4 one with its scale
    [n, groups] float16, and another comes without.
    """
    is_int4 = weight.dtype == torch.uint8
    if weight.dtype != torch.int8 and (not is_int4 or is_packed(weight)):
        if scale is not None:
            kind = "panels of int4, which hold it" if is_int4 else weight.dtype
            raise ValueError(f"{op}: {name} goes with an int8 weight or a plain int4 one only (the weight is {kind})")
        return
    if scale is None:
        raise ValueError(f"{op}: {name} is needed with an {KIND[weight.dtype]} weight (got None)")
    checks.shape(op, name, scale, (n, weight.shape[1] * 2 // GROUP) if is_int4 else (n,))
    dtype = torch.float16 if is_int4 else torch.float32
    if scale.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype} (got {scale.dtype})")
    checks.same_device(op, "the weight", weight.device, **{name: scale})


class _Arena(threading.local):
    """Memory on huge pages that `side_by_side` is filling, and how much of it is taken; None outside."""

    memory: Tensor | None = None
    used = 0
    depth = 0


_arena = _Arena()


@contextmanager
def side_by_side() -> Iterator[None]:
    """Weights packed inside lie one after the other on shared huge pages, as long as one of them lives.

    Most of a model's weights are smaller than a huge page, and could have none of their own. At one row of a
    [1228, 576] bf16 weight that is read from memory, 4 KiB pages leave 19 of 26 GB/s: every page is a TLB miss.
    """
    _arena.depth += 1
    try:
        yield
    finally:
        _arena.depth -= 1
        if not _arena.depth:
            _arena.memory = None


def _empty_panels(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where they fill a huge page (2 MiB), or in `side_by_side`, they lie on such pages (csrc/loops/huge_pages.h)."""
    size = math.prod(shape) * dtype.itemsize
    if _arena.depth and size <= _CHUNK // 2:
        if _arena.memory is None or _arena.used + size > _arena.memory.numel():
            _arena.memory, _arena.used = _huge(_CHUNK), 0
        memory = _arena.memory[_arena.used : _arena.used + size]
        _arena.used += -(-size // 64) * 64
    elif size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    else:
        memory = _huge(size)
    return memory.view(dtype).view(shape)


def _huge(size: int) -> Tensor:
    """uint8 [size] from the start of a huge page; what is never touched costs nothing.

    Mapped anew: memory that malloc hands out again has small pages already, and keeps them.
    """
    if hasattr(mmap, "MAP_ANONYMOUS"):
        mapped = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
    else:
        memory = torch.empty(size + HUGE_PAGE, dtype=torch.uint8, device="cpu")
    memory = memory[-memory.data_ptr() % HUGE_PAGE :][:size]
    _native.core().prefer_huge_pages(memory.data_ptr(), size)
    return memory
