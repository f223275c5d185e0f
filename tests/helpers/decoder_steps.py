"""A compact decoder, its first tokens, and the next ones by whole blocks or by their parts."""

import torch
from transformers import DynamicCache

import prunekern as pk
from prunekern.compacting import checkpoint
from prunekern.families.decoders import step as decoder_step
from tests.helpers.tiny_decoders import build
from tests.helpers.tiny_models import attached, prune

IDS = torch.arange(3, 27)[None]  # [1, 24]
ONE_CALL = ("llama", "mistral", "qwen2")  # Qwen3 has norms between product and positions


def compact(family="llama", kind="fp32", share=0.4, **changes):
    model = build(family, **changes)
    prune(attached(model), share, seed=1)
    small = pk.compact(model)
    checkpoint.set_weights(small, kind)
    return small


class by_parts:
    """While it lasts, blocks run call by call."""

    def __enter__(self):
        self.run, decoder_step._RUN = decoder_step._RUN, None

    def __exit__(self, *_):
        decoder_step._RUN = self.run


@torch.no_grad()
def start(model, ids=IDS, tokens=8):
    """A cache that holds the first tokens."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :tokens], past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model, cache, ids=IDS, tokens=4):
    """Logits of the next tokens, [batch, tokens, vocabulary]."""
    first = cache.get_seq_length()
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(first, first + tokens)], 1)
