"""A loop in which the masks learn nothing is told so: what would be removed then is chosen by ties."""

import pytest
import torch

import prunekern as pk
from tests.helpers.tiny_models import batch, build, names

LABELS = torch.tensor([0, 1, 2, 0])


def train(pruner, steps, loss=None, mask_lr=0.05):
    """README's own loop. from_pretrained leaves a model in eval mode, as `build` does."""
    model, optimizer = pruner.model, torch.optim.AdamW(pruner.param_groups(1e-3, mask_lr))
    for step in range(steps):
        (model(**batch(seed=step), labels=LABELS).loss if loss is None else loss(model, step)).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()


def attach(model=None, **options):
    return pk.attach(model or build(), pk.PruneConfig(**{"rank": 4, "sparsity": 0.3, "warm_steps": 3} | options))


def test_a_loop_that_forgets_model_train_is_refused():
    pruner = attach()
    with pytest.raises(
        RuntimeError, match=r"step: after 3 warm steps 10 of 10 masks .*eval mode.*call model.train\(\)"
    ):
        train(pruner, 5)
    pruner = attach()
    train(pruner, 2)
    before = pruner.plan()
    with pytest.raises(RuntimeError, match=r"finalize: no gradient has reached the masks in 2 steps \(.*model.train\("):
        pruner.finalize()
    assert not pruner.finalized and pruner.plan() == before
    pruner.finalize("uniform", "magnitude")  # asks for no training
    assert pruner.sparsity() >= 0.3


def test_the_same_without_warm_steps():
    """Preset "paper" starts flat: in eval mode the logits stay so."""
    pruner = attach(warm_steps=0, ramp_steps=2)
    with pytest.raises(RuntimeError, match=r"step: no gradient has reached the masks in 2 steps \(they are in eval mo"):
        train(pruner, 5)
    pruner = attach(build().train(), warm_steps=0, ramp_steps=2)
    train(pruner, 3)
    pruner.finalize()
    frozen = attach(build().train(), warm_steps=0, ramp_steps=2)
    train(frozen, 3, mask_lr=0.0)  # flat because they were asked to be
    frozen.finalize()


def test_part_of_the_model_in_eval_mode():
    model = build().train()
    pruner = attach(model)
    model.distilbert.transformer.layer[1].eval()
    with pytest.raises(
        RuntimeError, match=rf"5 of 10 masks .*\('{names('distilbert', 1)['q']}', ...\): they are in ev"
    ):
        train(pruner, 5)


def test_layers_that_the_loss_does_not_use():
    def of_layer_one(model, step):
        return model(**batch(seed=step), output_hidden_states=True).hidden_states[1].square().mean()

    with pytest.raises(
        RuntimeError, match=r"5 of 10 masks .*: no gradient has reached them: the loss must be computed"
    ):
        train(attach(build().train()), 5, of_layer_one)
    first = [name.removeprefix("distilbert.") for name in names("distilbert", 0).values()]
    train(attach(build().train(), targets=first, sparsity=0.1), 5, of_layer_one)


def test_a_loss_that_is_not_of_this_model():
    other = build().train()
    with pytest.raises(RuntimeError, match="10 of 10 masks .*: no gradient has reached them"):
        train(attach(build().train()), 5, lambda _, step: other(**batch(seed=step), labels=LABELS).loss)


def test_gradients_of_zero():
    pruner = attach(build().train())
    with pytest.raises(RuntimeError, match="10 of 10 masks .*: every gradient was zero or not finite"):
        train(pruner, 5, lambda model, step: 0.0 * model(**batch(seed=step), labels=LABELS).loss)


def test_a_layer_that_does_nothing_may_go():
    """Its saliency is zero because a gradient said so."""
    model = build().train()
    with torch.no_grad():
        model.get_submodule(names("distilbert", 1)["v"]).weight.zero_()
        model.get_submodule(names("distilbert", 1)["v"]).bias.zero_()
    pruner = attach(model)
    train(pruner, 5)
    pruner.finalize()


def test_the_next_step_is_refused_as_well():
    pruner = attach()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="have gathered no saliency"):
            train(pruner, 4)


def test_nothing_trained_at_all_is_allowed_and_said():
    pruner = attach()
    with pytest.warns(UserWarning, match="finalize: nothing was trained: all logits are alike, ties decide which go"):
        pruner.finalize()
    assert pruner.sparsity() >= 0.3
