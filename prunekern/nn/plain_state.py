"""A layer in few bits towards state dicts and `.to()`: to everyone else it has a plain weight in floating point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunekern.ops.int4 import quantize_weight_int4
from prunekern.ops.packing import DTYPES, quantize_weight

if TYPE_CHECKING:
    from typing_extensions import Self

_QUANTIZE = {"int8": quantize_weight, "int4": quantize_weight_int4}


def rounded_to(kind: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """weight [N, K], any float dtype, as `kind`: fp32, bf16, int8 or int4, and its scale; None but for int8 and int4.

    Shapes and errors are those of `quantize_weight` and `quantize_weight_int4`.
    """
    if kind in _QUANTIZE:
        return _QUANTIZE[kind](weight)
    return weight.to(DTYPES[kind]), None


class PlainState(nn.Module):
    """What `CompactLinear` is towards state dicts.

    `weight`: a parameter of any kind; `scale`: a buffer that is None but for int8 and int4 weights. `state_dict()`
    holds a plain weight [kept_out, kept_in], and `load_state_dict` rounds the one it is given. Where `scale` is a
    persistent buffer (`say_as_held`), both are in `state_dict()` as they are instead: so few-bit files are read and
    written, a layer at a time.
    """

    weight: nn.Parameter
    scale: Tensor | None
    _packed: Any

    if TYPE_CHECKING:
        weights: Any  # of CompactLinear, which says what these are
        kept_in: Any

        def plain_weight(self) -> Tensor: ...

    def say_as_held(self, yes: bool) -> None:
        """Whether `state_dict()` holds int8 and int4 weights with their scale as they are, from now on."""
        self.register_buffer("scale", self.scale, persistent=yes)

    @property
    def says_as_held(self) -> bool:
        """Whether `state_dict()` holds what the layer does, not a plain weight."""
        return "scale" not in self._non_persistent_buffers_set

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale, self._packed = self.scale, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)  # 16 bits would cost int8 its accuracy; int4's is fp16 by its kind
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.scale is not None and not self.says_as_held:
            destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        self._packed = None
        name, new = prefix + "weight", state_dict.get(prefix + "weight")
        if self.scale is not None and new is not None and not self.says_as_held:
            kind, shape = self.weights, (self.weight.shape[0], self.kept_in)
            if kind == "int4" and new.shape != shape:  # it could have the shape of the codes
                errors.append(f"{name} must have shape {list(shape)} (got {list(new.shape)})")
                return
            if new.shape == shape:
                try:
                    q, scale = rounded_to(kind, new)
                except (TypeError, ValueError) as error:
                    errors.append(f"{name}: {error}")
                    return
                assert scale is not None
                state_dict = {**state_dict, name: q}
                self.scale = scale.to(self.scale.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
