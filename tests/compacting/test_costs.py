"""What layers cost: near the divergence that rounding them makes, and none where nothing is predicted."""

import copy

import pytest
import torch
from transformers import AutoModel

import prunekern as pk
from prunekern.compacting.costs import costs
from prunekern.compacting.listening import run
from prunekern.compacting.losing import Loss
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_models import attached, batch, logits, names, prune


def decoder():
    model = tiny_decoders.build("llama")
    prune(attached(model), 0.3)
    return pk.compact(model)


def divergence(model, other, inputs):
    """Mean KL(model || other) of a prediction, float64."""
    total, count = 0.0, 0
    for one in inputs:
        mask = one.get("attention_mask")
        p, q = (logits(m, one).double().log_softmax(-1) for m in (model, other))
        each = (p.exp() * (p - q)).sum(-1)
        each = each[mask.bool()] if mask is not None and each.dim() == 2 else each
        total, count = total + float(each.sum()), count + each.numel()
    return total / count


MODELS = {
    "decoder": (decoder, tiny_decoders.batch, tiny_decoders.names(), ("v", "o", "up", "down")),
    "encoder": (small_model, batch, names("distilbert"), ("v", "o", "up", "down")),
}


@pytest.mark.parametrize("what", MODELS)
def test_near_the_divergence_that_rounding_makes(what):
    """Within a factor of 3: gradients are those of some hundred drawn answers, and the change is taken as small."""
    make, inputs_of, layer_names, parts = MODELS[what]
    model, inputs = make(), [inputs_of(seed=i) for i in range(60)]
    kept = [value for key, value in layer_names.items() if key in parts] or list(layer_names.values())
    losses = {name: Loss(name, model.get_submodule(name), ("int4",), "float", 10**6) for name in kept}
    used = run(model, inputs, list(losses.values()))
    before = copy.deepcopy(model.state_dict())
    found = costs(model, used, {name: loss.products for name, loss in losses.items()})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name in kept:
        other = copy.deepcopy(model)
        layer = other.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(losses[name].rounded("int4"))
        want = divergence(model, other, inputs)
        assert want / 3 < found[name]["int4"] < 3 * want, (name, found[name], want)


def test_none_for_a_model_that_predicts_no_classes(tmp_path):
    pk.save(small_model(), tmp_path / "m")
    base = AutoModel.from_pretrained(tmp_path / "m")
    assert costs(base, [batch()], {}) is None
