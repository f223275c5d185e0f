"""What tests of compact decoders compare: logits of attended positions, generated tokens."""

import torch

import prunekern as pk
from tests.helpers.tiny_decoders import reference
from tests.helpers.tiny_models import difference


@torch.no_grad()
def logits(model, inputs, **options):
    """[attended positions, vocabulary]"""
    return model(**inputs, **options).logits[inputs["attention_mask"].bool()]


def check(model, inputs, tolerance, small=None):
    small = pk.compact(model) if small is None else small
    masked = logits(model, inputs)
    assert difference(masked, logits(reference(model), inputs)) <= tolerance
    assert difference(logits(small, inputs), masked) <= tolerance
    return small


def generated(model, inputs, tokens=64, **options):
    return model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )
