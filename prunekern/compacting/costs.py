"""What rounding one layer costs a model's answers, in nats: without trying all layers one by one.

The change of the answers' distribution is half of delta^T F delta for a small change delta of a layer's outputs, F the
Fisher information: the mean of g g^T, where g are gradients of the log-likelihood of answers that are drawn from the
model itself (Martens, New Insights and Perspectives on the Natural Gradient Method, 2020). One backward pass shows all
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families
from ..ops.activations import activate
from .head import word_embeddings, word_head
from .listening import Inputs, Listener, heard, mask_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# x [rows, K] -> by kind the products that the layer makes of it, [rows, N] float32; "fp32" is there.
Products = Callable[[Tensor], Mapping[str, Tensor]]
PREDICTIONS = 1024


class _Cost(Listener):
    """Sums of one layer, by kind."""

    def __init__(self, name: str, module: nn.Module, products: Products):
        super().__init__(name, module, 1 << 62)
        self.products = products
        self.sums: dict[str, float] = {}
        self.x: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """See `Listener`."""
        self.x = x

    def made(self, module: nn.Module, args: Any, y: Tensor) -> None:
        """The hook after the layer's forward pass."""
        if y.requires_grad:
            y.register_hook(self.felt)

    def felt(self, grad: Tensor) -> None:
        """grad [..., out]: of the log-likelihood, summed."""
        if self.x is None:
            return
        layer: Any = self.module
        if self.is_masked(grad):
            grad = grad[self.mask]
        grad = grad.reshape(-1, grad.shape[-1])[: len(self.x)].float()
        index = getattr(layer, "out_index", None)
        grad = grad if index is None else grad[:, index]
        with torch.no_grad():
            made = dict(self.products(self.x))
            activation, bias = getattr(layer, "activation", "none"), layer.bias
            if activation != "none":
                made = {k: activate(y if bias is None else y + bias, activation) for k, y in made.items()}
            right = made.pop("fp32")
            for kind, y in made.items():
                cost = 0.5 * float(((y - right) * grad).sum(1).double().square().sum())
                self.sums[kind] = self.sums.get(kind, 0.0) + cost
        self.x = None


def _wants_gradient(module: nn.Module, args: tuple[Any, ...]) -> None:
    """The hook before the first block: whatever comes after it gets one."""
    args[0].requires_grad_()


def costs(
    model: PreTrainedModel, batches: Iterable[Inputs], products: Mapping[str, Products], seed: int = 0
) -> dict[str, dict[str, float]] | None:
    """By layer and kind, nats of a prediction: of a token for a causal language model, of a text for a classifier. None
    for a model that predicts no classes, and for one of a class of your own without input embeddings.

    batches: as `run` returns them; so many as make PREDICTIONS. products: of the layers by name.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    listeners = [_Cost(name, model.get_submodule(name), made) for name, made in products.items()]
    predicted, tokens = 0, word_head(model) is not None
    embeddings = word_embeddings(model)
    if families.own_of(model) is not None and embeddings is None:
        return None
    handles = [one.module.register_forward_hook(one.made) for one in listeners]
    if families.own_of(model) is None:
        first, _ = families.of(model).blocks(model)[0]
        handles.append(first.register_forward_pre_hook(_wants_gradient))
    elif embeddings is not None:
        handles.append(embeddings.register_forward_hook(lambda m, args, y: y.requires_grad_()))
    try:
        with heard(model, listeners), torch.enable_grad():
            for inputs in batches:
                mask = mask_of(inputs)
                for one in listeners:
                    one.mask = mask
                logits = getattr(model(**inputs), "logits", None)
                if logits is None or logits.shape[-1] < 2 or logits.dim() != (3 if tokens else 2):
                    return None
                logits = logits[mask] if tokens and mask is not None else logits.flatten(0, -2)
                log_p = logits.float().log_softmax(-1)
                drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
                log_p.gather(1, drawn).sum().backward()
                predicted += len(logits)
                if predicted >= PREDICTIONS:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {one.name: {kind: total / max(predicted, 1) for kind, total in one.sums.items()} for one in listeners}
