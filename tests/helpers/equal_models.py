"""The core promise as one check: compact output equals masked, and both a stock model merged by the definition."""

import prunekern as pk
from tests.helpers.tiny_models import difference, logits, reference

F64, F32 = 1e-10, 1e-4  # the promise: max |difference| of logits relative to max |logit|


def check(model, inputs, tolerance, small=None):
    small = pk.compact(model) if small is None else small
    want = logits(reference(model), inputs)
    masked = logits(model, inputs)
    assert difference(masked, want) <= tolerance
    assert difference(logits(small, inputs), masked) <= tolerance
    return small
