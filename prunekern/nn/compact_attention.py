"""CompactAttention: queries, keys and values of kept channels in one product, and the attention of ragged heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekern.ops import checks
from prunekern.ops.compact_attention import compact_attention
from prunekern.ops.compact_linear import compact_linear
from prunekern.ops.packing import is_packable, may_pack

from .compact_linear import CompactLinear, packs
from .hooked import is_hooked, is_replaced
from .packed import Packed

if TYPE_CHECKING:
    from typing_extensions import Self

Layers = tuple[CompactLinear, CompactLinear, CompactLinear]
_f32 = torch.float32
_NARROW = (torch.bfloat16, torch.int8, torch.uint8)


class CompactAttention(nn.Module):
    """y = attention of q(x), k(x), v(x) on heads of different widths; see `prunekern.ops.compact_attention`.

    Args:
        qk_first: heads + 1 ints, ascending from 0: head h has kept query and key channels qk_first[h] to
            qk_first[h + 1].
        v_first: heads + 1 ints, ascending from 0: the same for values.
        scale: of the logits.
        shared_by: query heads of each key/value head; qk_first then is that of keys.
        causal: the queries are the last tokens, and see none after their own.

    It has no parameters: `forward` is given the three projections, which stay where a model keeps them, and uses
    their kept channels only (their `out_index`, if any, serves other readers). Where the C++ kernels run, the three
    weights are packed as one, at the first call and again when one of them changed; they must then share their kind.
    Copies, pickles and `.to()` drop the packed weight. Anything else (gradients, other devices and dtypes, graphs of
    torch.compile) runs the three one after the other.
    """

    def __init__(
        self,
        qk_first: Sequence[int],
        v_first: Sequence[int],
        scale: float,
        shared_by: int = 1,
        causal: bool = False,
    ):
        super().__init__()
        self.qk_first, self.v_first, self.scale = tuple(qk_first), tuple(v_first), float(scale)
        self.shared_by, self.causal = shared_by, causal
        self._packed: Packed | None = None
        self._layers: Layers | None = None  # of which it is; a tuple, so that they are no children

    def forward(
        self, x: Tensor, layers: Layers, key_mask: Tensor | None = None, fuses: bool | None = None
    ) -> Tensor:  # fmt: skip
        """x: [batch, tokens, in] -> [batch, tokens, shared_by v_first[-1]].

        layers: one tuple (q, k, v) of CompactLinear. key_mask: bool [batch, tokens], True where a key may be read, or
        None. fuses: as `project`. TypeError or ValueError for layers that do not make the heads' channels.
        """
        if not isinstance(x, Tensor):
            checks.tensors("CompactAttention", {"x": x}, {})
        q, k, v = self.project(x, layers, fuses)
        return self.attend(q, k, v, key_mask, arithmetic_of(layers))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, arithmetic: str = "fp32",
        causal: bool | None = None, window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Of queries, and of keys and values of these and earlier tokens. arithmetic, window: as in
        `compact_attention`. causal: None for the module's own.
        """
        causal = self.causal if causal is None else causal
        return compact_attention(
            q, k, v, self.qk_first, self.v_first, key_mask, self.scale, self.shared_by, causal, arithmetic, window
        )

    def project(self, x: Tensor, layers: Layers, fuses: bool | None = None) -> Sequence[Tensor]:
        """q, k and v of x, kept channels only: three tensors, or three parts of one. fuses: the answer, if known."""
        if fuses is None:
            self._check(layers)
        packed = self.packed_for(x, layers, fuses)
        if packed is None:
            return [_kept(layer, x) for layer in layers]
        keys, values = self.qk_first[-1], self.v_first[-1]
        sizes = (self.shared_by * keys, keys, values)
        y = compact_linear(x, packed.weight, packed.bias, None, None, sum(sizes), "none", None, packed.scale,
                           packed.activations)  # fmt: skip
        return y.split_with_sizes(sizes, -1)

    def _check(self, layers: Layers) -> None:
        sizes = (self.shared_by * self.qk_first[-1], self.qk_first[-1], self.v_first[-1])
        for name, layer, size in zip("qkv", layers, sizes, strict=True):
            if not isinstance(layer, CompactLinear):
                raise TypeError(f"CompactAttention: {name} must be CompactLinear (got {type(layer).__name__})")
            if layer.weight.shape[0] != size:
                raise ValueError(f"CompactAttention: {name} must make {size} channels (got {layer.weight.shape[0]})")

    def fuses(self, x: Tensor, layers: Layers) -> bool:
        """Whether the kernels can run x: float32, or 16 bits like the weights, on the CPU, nothing wants a gradient."""
        if any("weight" not in layer._parameters for layer in layers):  # a parametrisation computes it
            return False
        weights = [layer._parameters["weight"] for layer in layers]
        dtype, width = weights[0].dtype, x.shape[-1]
        if x.dtype is not _f32 and x.dtype is not dtype:
            return False
        if any(layer.activations is not layers[0].activations for layer in layers):
            return False
        for layer, weight in zip(layers, weights, strict=True):
            if weight.dtype is not dtype or layer.kept_in != width or not is_packable(weight):
                return False
            if layer._buffers["in_index"] is not None or layer.activation != "none":
                return False
        return packs(x, None, *weights, *(layer._parameters["bias"] for layer in layers))

    def packed_for(self, x: Tensor, layers: Layers, fuses: bool | None = None) -> Packed | None:
        """The three weights packed as one, up to date; None where x must go through the layers one by one."""
        if torch.compiler.is_compiling() or not (self.fuses(x, layers) if fuses is None else fuses):
            return None
        if is_hooked(*layers) or is_replaced(*layers):
            return None
        packed = self._packed
        if packed is not None and self._layers == layers and packed.is_fresh():
            return packed
        if not all(may_pack(layer._parameters["weight"]) for layer in layers):
            return None
        return self.pack_layers(layers)

    def pack_layers(self, layers: Layers) -> Packed:
        """Pack the weights of q, k and v as one now. ValueError where they do not go together."""
        self._packed, self._layers = Packed(layers), layers
        return self._packed

    def extra_repr(self) -> str:
        """Heads and their channels."""
        text = f"heads={len(self.v_first) - 1}, query_key={self.qk_first[-1]}, value={self.v_first[-1]}"
        return text if self.shared_by == 1 else f"{text}, shared_by={self.shared_by}"

    def _drop(self) -> None:
        self._packed, self._layers = None, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles pack their own.
        return {**self.__dict__, "_packed": None, "_layers": None}


def arithmetic_of(layers: Layers) -> str:
    """bf16 where the projections lose as much already: weights in few bits, activations not asked for as they are."""
    q = layers[0]
    dtype = q._parameters["weight"].dtype if "weight" in q._parameters else None
    return "bf16" if dtype in _NARROW and q.activations != "float" else "fp32"


def _kept(layer: CompactLinear, x: Tensor) -> Tensor:
    """What a layer makes, kept channels only."""
    if not (is_hooked(layer) or is_replaced(layer)):
        return layer.run(x, None, layer.activation, scatter=False)
    y: Tensor = layer(x)
    return y if layer.out_index is None else y.index_select(-1, layer.out_index)
