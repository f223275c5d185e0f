"""How fast models run beside one another: a compact one and its dense twin."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from .. import families
from ..machine.measure import interleaved, threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def latency(
    models: Mapping[str, PreTrainedModel], batch: int, tokens: int, seconds: float = 3.0, thread_count: int = 1
) -> dict[str, float]:
    """Fastest forward pass of each model, in seconds, on `batch` full sequences of `tokens` random ids.

    ValueError for more tokens than a model has positions for, and for one that reads images.
    """
    for name, model in models.items():
        if "pixel_values" in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"latency: models must read text, input_ids [batch, tokens] (got {type(model).__name__} as the {name} "
                "model, which takes pixel_values); prunekern.machine.measure times any call"
            )
        most = families.most_tokens(model)
        if most is not None and tokens > most:
            raise ValueError(f"latency: tokens must be at most {most} for the {name} model (got {tokens})")
    vocabulary = min(model.config.vocab_size for model in models.values())
    generator = torch.Generator(device="cpu").manual_seed(0)
    device = next(next(iter(models.values())).parameters()).device
    ids = torch.randint(5, vocabulary, (batch, tokens), generator=generator, device="cpu").to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(model: PreTrainedModel) -> Callable[[], object]:
        def call() -> None:
            model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return call

    with threads(thread_count), torch.inference_mode():
        return interleaved({name: forward(model) for name, model in models.items()}, seconds)


def dense_twin(compact: PreTrainedModel) -> PreTrainedModel:
    """The dense model of a compact one's config, weights random: for speed, where weights do not matter."""
    config = type(compact.config).from_dict(
        {k: v for k, v in compact.config.to_dict().items() if k != "quantization_config"}
    )
    config._attn_implementation = compact.config._attn_implementation
    return type(compact)(config).eval()
