"""A model read from few-bit files: its layers take the kinds that are stored before transformers reads the weights, so
that none is ever there in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..nn import CompactLinear
from ..ops.int4 import dequantize_weight_int4
from ..ops.packing import DTYPES, dequantize_weight
from .head import hold_tied, is_tied, set_head_weights, sharing, word_embeddings, word_head
from .plan import Plan
from .stored import ROUNDED, Stored, remember
from .tensors import Headers, check_tensors, check_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Restoring:
    """Made of a compact skeleton on the meta device, which it changes: linears as `stored` says, their codes and scales
    in `state_dict()`, and a table of embeddings that is stored in codes as those.

    `check` compares the headers of the files; `finish` makes a model of it once the weights are there.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, stored: Stored):
        self.plan, self.stored = plan, stored
        self._layers: dict[str, CompactLinear] = {}
        for name in plan.layers:
            self._hold(name, model.get_submodule(name), stored.kind(name))
        names = {module: name for name, module in model.named_modules()}
        self._head, head = "", word_head(model)
        if head is not None and stored.head is not None and not is_tied(model):
            self._head, self._head_shape = names[head], (head.weight.shape[0], head.weight.shape[1])
            if stored.head != "fp32":
                head = sharing(model.get_output_embeddings().weight, head)
                model.set_output_embeddings(head)
                self._hold(self._head, head, stored.head)
        self._table = ""
        embeddings: Any = word_embeddings(model)
        if stored.embeddings in ROUNDED and embeddings is not None:
            rows, width = embeddings.weight.shape
            self._table, self._table_shape = names[embeddings], (rows, width)
            self._table_dtype = embeddings.weight.dtype
            twin = CompactLinear(embeddings.weight, weights=stored.embeddings)
            embeddings.weight = twin.weight
            embeddings.register_buffer("scale", twin.scale)

    def _hold(self, name: str, layer: CompactLinear, kind: str) -> None:
        if kind in ROUNDED:
            self._layers[name] = layer
            layer.set_weights(kind)
            layer.say_as_held(True)
        elif kind == "bf16" and layer.weight.dtype == torch.float32:  # asked for in another dtype, they have that
            layer.set_weights(kind)

    def check(self, model: nn.Module, headers: Headers) -> None:
        """ValueError, naming file and tensor, for what is missing, or has another shape or dtype than it should."""
        self._headers = headers
        check_tensors(model, self.plan, headers, self.stored)
        if self._head:
            check_weight(headers, self._head, self._head_shape, self.stored.head, "by config.json")
        if self._table:
            check_weight(headers, self._table, self._table_shape, self.stored.embeddings, "by config.json")

    @torch.no_grad()
    def finish(self, model: PreTrainedModel) -> None:
        """Give layers plain state dicts again, embeddings floating-point numbers, and hold the head as it is stored.

        ValueError, naming file and tensor, for scales and codes that rounding does not give, and for weights that are
        offloaded to disk.
        """
        if "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                "from_pretrained: device_map must put no layer on disk (got 'disk'): it is a few-bit file, and what "
                "reads weights from disk knows floating-point ones only. Store it with weights='fp32'"
            )
        for name, layer in self._layers.items():
            assert layer.scale is not None
            check_values(self._headers, name, layer.weight, layer.scale)
            layer.say_as_held(False)
        if self._table:
            codes, scale = self._embed(model)
            if word_head(model) is not None and is_tied(model):
                hold_tied(model, self.stored.embeddings, codes, scale)
        if self._can_hold_head(model):
            assert self.stored.head is not None
            set_head_weights(model, self.stored.head)
        remember(model, self.stored.weights)

    def _can_hold_head(self, model: PreTrainedModel) -> bool:
        """Whether there is a head that is not held yet; one in fp32, or in a dtype asked for, is left as it is."""
        if word_head(model) is None or self.stored.head in (None, "fp32") or (self._table and is_tied(model)):
            return False
        floats = (torch.float32, torch.bfloat16)
        return self.stored.head in ROUNDED or model.get_input_embeddings().weight.dtype in floats

    def _embed(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Give the embeddings the values of their codes; returns codes and scale."""
        embeddings = model.get_input_embeddings()
        codes, scale = embeddings.weight.detach(), embeddings.scale
        if codes.is_meta:
            raise ValueError(f"from_pretrained: device_map must not offload {self._table!r}: it is stored in few bits")
        check_values(self._headers, self._table, codes, scale)
        if codes.dtype == torch.int8:
            values = dequantize_weight(codes, scale)
        else:
            values = dequantize_weight_int4(codes, scale, self._table_shape[1])
        del embeddings.scale
        embeddings.weight = nn.Parameter(values.to(self._table_dtype).contiguous())
        return codes, scale


def check_values(headers: Headers, name: str, codes: Tensor, scale: Tensor) -> None:
    """ValueError, naming file and tensor, for scales and codes that rounding does not give, of one weight. Scales of
    int4 may be negative; there is no code of four bits that rounding does not give.
    """

    def file(tensor: str) -> str:
        found = headers.find(tensor)
        return headers.where if found is None else found[2]

    wrong = ~scale.isfinite()
    if codes.dtype == DTYPES["int8"]:
        wrong |= scale < 0
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        what = "finite" if codes.dtype != DTYPES["int8"] else "finite and not negative"
        got = float(scale[tuple(at)])
        raise ValueError(f"{file(f'{name}.scale')}: tensor '{name}.scale' must be {what} (got {got} at {at})")
    if codes.dtype == DTYPES["int8"] and codes.numel() and not codes.is_meta and int(codes.amin()) < -127:
        raise ValueError(f"{file(f'{name}.weight')}: tensor '{name}.weight' must be -127 to 127 (got -128)")
