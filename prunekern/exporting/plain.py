"""The plain twin of a compact model: the same answers from PyTorch's own operators, for tools that know no others."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import families
from ..compacting.head import word_head
from ..families.decoders.attention import CompactCausalAttention, Positions
from ..families.decoders.heads import DecoderLayout
from ..families.wrapped import is_transformers, unwrapped
from ..nn import CompactLinear
from ..nn.buffers import nones_last
from ..ops.compact_linear import activate

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def is_compact(model: nn.Module) -> bool:
    """Whether block linears are compact; the head of a causal language model alone may be where a model is dense."""
    head = word_head(model) if hasattr(model, "config") else None
    return any(isinstance(module, CompactLinear) and module is not head for module in model.modules())


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A compact model as one of plain operators: same class and call signature, in fp32 on the CPU, frozen, in eval
    mode.

    `model` is left alone; the twin shares the memory of its fp32 parameters, those of attention excepted. bf16 and int8
    weights become the fp32 values they stand for. Attention is transformers' "sdpa" on heads padded to a layer's widest
    one: zero rows in q, k and v, and zero columns in o, so that nothing is gathered or scattered around it. Caches of
    decoders hold kept channels only, as those of the compact model do. Hooks do not come along. Of a model of a class
    of your own (`prunekern.families.register`) the linears are exchanged, and nothing else.

    ValueError for a model that is not compact. Wrappers around it are treated as by `compact`.
    """
    model = unwrapped(model, "plain_twin")
    if not is_compact(model):
        raise ValueError(f"plain_twin: model is not compact ({type(model).__name__}); call prunekern.compact(model)")
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo[id(module._forward_hooks)], memo[id(module._forward_pre_hooks)] = OrderedDict(), OrderedDict()
        if not isinstance(module, CompactLinear):
            memo |= {id(p): _fp32(p) for p in module._parameters.values() if p is not None and id(p) not in memo}
    places = _places(model)
    for name, layer in model.named_modules():
        if isinstance(layer, CompactLinear):
            tied: nn.Parameter | None = memo.get(id(layer.weight))  # a head, to the embeddings
            weight = _fp32(layer.plain_weight()) if tied is None else tied
            memo[id(layer)] = _plain(layer, weight, *places.get(name, (False, None, 0)))
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to("cpu", torch.float32 if buffer.is_floating_point() else buffer.dtype)
        if isinstance(module, CompactCausalAttention):
            module.__class__ = _plain_class(type(module))
    if is_transformers(twin):
        twin.set_attn_implementation("sdpa")  # in a config of its own
    return twin.eval()


def _fp32(tensor: Tensor) -> nn.Parameter:
    """The same numbers, and where they are fp32 on the CPU the same memory, in a parameter of its own."""
    return nn.Parameter(tensor.detach().to("cpu", torch.float32), requires_grad=False)


def _places(model: PreTrainedModel) -> dict[str, tuple[bool, Tensor | None, int]]:
    """By name of the linears around attention: whether rows are padded as heads are; or, of what reads heads, where its
    columns belong among so many channels.
    """
    found: dict[str, tuple[bool, Tensor | None, int]] = {}
    for _, block, *_ in families.of(model).blocks(model):
        attention, v = model.get_submodule(block.q.rpartition(".")[0]), model.get_submodule(block.v)
        found |= dict.fromkeys((block.q, block.k, block.v), (True, None, 0))
        if isinstance(attention, CompactCausalAttention):
            at = attention.layout
            found[block.o] = (False, at.context, at.kv * at.shared_by * at.width)
        else:
            found[block.o] = (False, v.out_index, v.out_features)
    return found


def _plain(layer: CompactLinear, weight: nn.Parameter, pads: bool, columns: Tensor | None, width: int) -> PlainLinear:
    bias = None if layer.bias is None else _fp32(layer.bias)
    in_index, out_index = (None if i is None else i.cpu() for i in (layer.in_index, layer.out_index))
    if columns is not None and 0 < weight.shape[1] < width:
        weight = _fp32(weight.new_zeros(weight.shape[0], width).index_copy(1, columns.cpu(), weight))
    if pads and out_index is not None:
        n = layer.out_features
        weight = _fp32(weight.new_zeros(n, weight.shape[1]).index_copy(0, out_index, weight))
        bias = None if bias is None else _fp32(bias.new_zeros(n).index_copy(0, out_index, bias))
        out_index = None
    return PlainLinear(weight, bias, in_index, out_index, layer.out_features, layer.activation)


class PlainLinear(nn.Module):
    """What a CompactLinear computes, in operators that exporters know; arguments as there, parameters used as they are.

    Channels get to their places by Gather along rows, zeros from one row more. With the product before it, [128 | 1024,
    2300] -> 576 of 768 channels and the residual added, one thread, ms in ONNX Runtime and in OpenVINO:

    | Gather along rows                    | 3.3, 46.8 | 3.9, 52.3 |
    | ScatterElements                      | 3.5, 55.6 | 3.8, 54.3 |
    | index_add (exported: ScatterND)      | 3.4, 50.9 | 4.6, 57.5 |
    | Gather along channels                | 4.0, 60.0 | 3.7, 51.8 |
    | removed rows as zeros in the weight  | 4.3, 66.2 | 4.8, 70.9 |
    """

    out_index = None  # readers of the result find every channel in its place
    weight: nn.Parameter | None  # there unless `constant` is
    bias: nn.Parameter | None
    in_index: Tensor | None
    source: Tensor | None
    constant: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        in_index: Tensor | None,
        out_index: Tensor | None,
        out_features: int,
        activation: str,
    ):
        super().__init__()
        n, k = weight.shape
        matrix: nn.Parameter | None = weight
        self.activation = activation
        source = constant = None
        if n == 0 or k == 0:  # not every runtime has a product of nothing
            constant = torch.zeros(out_features, dtype=torch.float32, device="cpu")
            if n and bias is not None:
                own = torch.arange(n, device="cpu") if out_index is None else out_index
                constant = constant.index_copy(0, own, activate(bias.detach(), activation))
            matrix = bias = None
        elif out_index is not None:
            source = torch.full((out_features,), n, device="cpu").index_copy(
                0, out_index, torch.arange(n, device="cpu")
            )
        self.weight, self.bias = matrix, bias
        self.register_buffer("in_index", in_index, persistent=False)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("constant", constant, persistent=False)
        nones_last(self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [..., tokens, in] -> [..., tokens, out_features], or what broadcasts to it; residual of that shape."""
        y = self._product(x) if self.constant is None else self.constant
        return y if residual is None else residual + y

    def _product(self, x: Tensor) -> Tensor:
        assert self.weight is not None  # else there is a constant
        if self.in_index is not None:
            x = x.index_select(-1, self.in_index)
        y = activate(F.linear(x, self.weight, self.bias), self.activation)  # [..., tokens, N]
        if self.source is None:
            return y
        rows = F.pad(y.transpose(-1, -2), (0, 0, 0, 1))  # [..., N + 1, tokens], zeros in the last
        return rows.index_select(-2, self.source).transpose(-1, -2)


class _PlainCausal(CompactCausalAttention):
    """Attention of a twin, mixed into the compact one of a family: all is padded but the cache."""

    def _on(self, device: torch.device) -> Positions:
        return self.layout.turn, None, None, None

    def _cached(self, key: Tensor, value: Tensor, past: Cache | None) -> tuple[Tensor, Tensor]:
        """Padded keys and values of these tokens -> of all tokens so far, [batch, tokens, kv width]."""
        if past is None:
            return key, value
        at = self.layout
        keys, values = super()._cached(key.index_select(-1, at.key), value.index_select(-1, at.value), past)
        return _widened(keys, at.key, at), _widened(values, at.value, at)


def _widened(flat: Tensor, index: Tensor, at: DecoderLayout) -> Tensor:
    """[batch, tokens, kept] -> [batch, tokens, kv width], zero where nothing is kept."""
    n = index.numel()
    source = torch.full((at.kv * at.width,), n, device="cpu").index_copy(0, index, torch.arange(n, device="cpu"))
    return F.pad(flat, (0, 1)).index_select(-1, source)


_plain_classes: dict[type, type] = {}


def _plain_class(cls: type) -> type:
    if cls not in _plain_classes:
        _plain_classes[cls] = type(f"Plain{cls.__name__}", (_PlainCausal, cls), {})
    return _plain_classes[cls]
