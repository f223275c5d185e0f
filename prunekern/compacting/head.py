"""The output embeddings of causal language models: read at every token, so they run on our kernel, and are held in as
few bytes as the blocks are. They are never pruned.

At one row, [49152, 576] in fp32, PyTorch's product reads 12 GB/s where ours reads 31; the packed copy costs the head's
size in memory once more.

Towards everyone else it is the `nn.Linear` it replaces, unless it is held in int8 or int4, where its weight alone says
nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..families.wrapped import is_transformers
from ..nn import CompactLinear
from ..ops.packing import WEIGHTS
from ..ops.seen import Seen

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head(CompactLinear):
    """A head that stays in the bits it is held in: given the embeddings' weight again, as `tie_weights()` does, one in
    bf16, int8 or int4 is rounded from it anew. One whose weight is a floating-point one is a `LinearHead`.
    """

    _rounded_from: Rounded | None = None

    def run(self, x: Tensor, residual: Tensor | None, activation: str, scatter: bool = True) -> Tensor:
        """As `CompactLinear.run`; of the embeddings as they are now, where the head is rounded from them."""
        if self._rounded_from is not None and not is_compiling():
            self.refresh()
        return super().run(x, residual, activation, scatter)

    def refresh(self) -> None:
        """Round the embeddings as they are now, where the head is rounded from them and they have changed."""
        source = None if self._rounded_from is None else self._rounded_from.changed()
        if source is not None:
            self.weight = source

    def is_rounded_from(self, embeddings: nn.Module) -> bool:
        """Whether it holds int8 or int4 values, and follows these embeddings."""
        source = self._rounded_from
        return self.scale is not None and source is not None and source.embeddings() is embeddings

    def set_weights(self, kind: str, activations: str | None = None) -> CompactLinear:
        """As `CompactLinear.set_weights`."""
        super().set_weights(kind, activations)
        self.__class__ = Head if self.scale is not None else LinearHead
        return self

    if not TYPE_CHECKING:  # nn.Linear promises an attribute

        @property
        def in_features(self) -> int:
            """Channels of x, as of an `nn.Linear`."""
            return self.kept_in

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self.weights if name == "weight" and "weight" in self._parameters else None
        super().__setattr__(name, value)
        if kind in ("bf16", "int8", "int4") and value.is_floating_point():
            self.scale = self._packed = None
            self.set_weights(kind)


class Rounded:
    """The embeddings that a tied head in fewer bits is rounded from, and what was seen of them.

    They are held weakly, as they are no part of the head. Deep copies know their own embeddings, pickles none: there,
    and in graphs of torch.compile, a head follows `tie_weights()` only.
    """

    def __init__(self, embeddings: nn.Module):
        self.embeddings = weakref.ref(embeddings)
        self.look()

    def look(self) -> None:
        """See the weight as it is."""
        embeddings = self.embeddings()
        assert embeddings is not None, "its embeddings are gone"
        weight = embeddings._parameters["weight"]
        assert weight is not None
        self._weight, self._seen = weight, Seen(weight)

    def changed(self) -> nn.Parameter | None:
        """The embeddings' weight where it was written to or replaced since it was seen, and then it is seen again."""
        embeddings = self.embeddings()
        weight = None if embeddings is None else embeddings._parameters.get("weight")
        # `holds`, as the embeddings may lie on a GPU, where `is_unchanged` knows nothing.
        if weight is None or (weight is self._weight and self._seen.holds(weight)):
            return None
        self.look()
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> Rounded | None:
        embeddings = memo.get(id(self.embeddings()))
        return None if embeddings is None else Rounded(embeddings)

    def __reduce__(self) -> Any:
        return type(None), ()


class _Linear(nn.Linear):
    """`nn.Linear` by its class alone: `CompactLinear` makes the parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class LinearHead(Head, _Linear):  # type: ignore[misc]  # weight and bias are what CompactLinear says they are
    """A head that is an `nn.Linear` to everyone who asks: resizing, initialisation, adapters put on top."""


def word_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The table of input embeddings, of one weight [tokens, width]; None for models of images, of two towers, and for
    what is no model of transformers.
    """
    if not is_transformers(model):
        return None
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    weight = getattr(found, "weight", None)
    return found if isinstance(weight, Tensor) and weight.dim() == 2 else None


def word_head(model: PreTrainedModel) -> nn.Linear | CompactLinear | None:
    """The output embeddings of a causal language model of transformers; None for any other."""
    if not type(model).__name__.endswith("ForCausalLM") or not is_transformers(model):
        return None
    head: nn.Linear | CompactLinear | None = model.get_output_embeddings()
    return head


def is_tied(model: PreTrainedModel) -> bool:
    """Whether output embeddings are the input embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def set_head_weights(model: PreTrainedModel, weights: str, activations: str = "auto") -> None:
    """Hold the head as fp32, bf16, int8 or int4, and what it reads as `prunekern.load` says; nothing happens to a model
    without one.

    A tied one in fp32 shares the embeddings' parameter; in fewer bits it is rounded from them, whatever it was before.
    One that is rounded so already keeps its values: of few-bit files, the very ones that they hold.
    """
    head = word_head(model)
    if head is None:
        return
    if isinstance(head, Head) and head.weights == weights and head.is_rounded_from(model.get_input_embeddings()):
        head.refresh()
        head.set_weights(weights, activations)
        return
    if is_tied(model) or not isinstance(head, CompactLinear):
        source = model.get_input_embeddings() if is_tied(model) else model.get_output_embeddings()
        head = sharing(source.weight, head)
        model.set_output_embeddings(head)
    head.set_weights(weights, activations)
    if is_tied(model) and isinstance(head, Head) and head.weight is not model.get_input_embeddings().weight:
        head._rounded_from = Rounded(model.get_input_embeddings())
    _resize_with(model)


def hold_tied(model: PreTrainedModel, kind: str, codes: Tensor, scale: Tensor) -> None:
    """Hold the tied head as these int8 or int4 values, of which the embeddings are the floating-point ones: rounded
    anew, a scale could differ in its last bit.
    """
    embeddings, old = model.get_input_embeddings(), word_head(model)
    assert old is not None
    head = sharing(embeddings.weight, old)
    head.hold(codes, scale)
    head.set_weights(kind)
    head._rounded_from = Rounded(embeddings)
    model.set_output_embeddings(head)
    _resize_with(model)


def _resize_with(model: PreTrainedModel) -> None:
    """Our head stays one when the model is resized."""
    if not isinstance(vars(model).get("resize_token_embeddings"), _Resizing):
        vars(model)["resize_token_embeddings"] = _Resizing(model)


class _Resizing:
    """`model.resize_token_embeddings` where the head is ours: transformers would leave a plain, slow one in its place,
    one in bf16 under activations in fp32, or stop half way at one in int8 or int4.

    The model is held weakly: with a circle, its memory would come back when Python next looks for circles.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As `PreTrainedModel.resize_token_embeddings`; the head is then held as it was."""
        model = self.model()
        assert model is not None, "its model is gone"
        resize: Callable[..., nn.Embedding] = type(model).resize_token_embeddings
        head = word_head(model)
        if not isinstance(head, Head):
            return resize(model, *args, **kwargs)
        kind, activations = head.weights, head.activations
        model.set_output_embeddings(_dense(model, head))
        try:
            embeddings = resize(model, *args, **kwargs)
        except BaseException:
            model.set_output_embeddings(head)
            raise
        if kind in WEIGHTS:
            set_head_weights(model, kind, activations)
        else:  # of a model in fp64 or fp16
            model.set_output_embeddings(sharing(model.get_output_embeddings().weight, model.get_output_embeddings()))
        return embeddings

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo.get(id(self.model()))  # the model's copy, which is begun before what is in it
        return self if twin is None else _Resizing(twin)

    def __reduce__(self) -> Any:
        return getattr, (self.model(), "resize_token_embeddings")  # of the class; `prunekern.load` puts ours there


def _dense(model: PreTrainedModel, head: Head) -> nn.Linear:
    """The head as transformers makes it, with the embeddings' parameter where it is tied to them."""
    dtype = model.get_input_embeddings().weight.dtype
    weight = model.get_input_embeddings().weight if is_tied(model) else head.plain_weight()
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=head.bias is not None, device="meta")
    dense.weight = weight if is_tied(model) else nn.Parameter(weight.detach().to(dtype), head.weight.requires_grad)
    if head.bias is not None:
        dense.bias = head.bias
    return dense.train(head.training)


@contextmanager
def plain_head(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, a tied head shares the embeddings' weight: a file then holds them once, and not rounded."""
    head = word_head(model)
    if head is None or not is_tied(model) or head.weight is model.get_input_embeddings().weight:
        yield
        return
    model.set_output_embeddings(sharing(model.get_input_embeddings().weight, head))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def sharing(weight: nn.Parameter, head: nn.Linear | CompactLinear) -> Head:
    """A head with this very parameter."""
    shared = LinearHead(weight, head.bias)
    shared.weight = weight
    return shared.train(head.training)
