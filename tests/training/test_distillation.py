"""The model as it was teaches the pruned one: what it computes is that model's, losses are by definition, channels are
chosen by curvature where there are no labels.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import prunekern as pk
from prunekern.pruning.original import Original
from prunekern.training.vocabulary import vocabulary_loss
from tests.helpers import tiny_decoders
from tests.helpers.callback_runs import Unlabelled, fresh
from tests.helpers.tiny_models import attached, batch, build, difference, logits, prune
from tests.helpers.trainer_runs import Each, Stop, result, same

# -- the original ----------------------------------------------------------------------------------------------


def trained(model, steps=3):
    """An attached model after some steps that move all that is trainable, its head too."""
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3, warm_steps=0))
    original = Original(pruner)
    optimizer = torch.optim.SGD(pruner.param_groups(lr=0.5, mask_lr=5.0))
    model.train()
    for step in range(steps):
        inputs = batch(4, seed=step)
        model(**inputs).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    return pruner, original


def test_the_original_is_the_dense_model():
    model = build()
    dense = build()
    pruner, original = trained(model)
    inputs = batch(5, seed=9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert difference(logits(model.eval(), inputs), logits(dense, inputs)) > 0.05
    model.train()
    with original() as same_model:
        assert same_model is model and not model.training and not torch.is_grad_enabled()
        got = model(**inputs).logits
    assert torch.equal(got, dense(**inputs).logits)
    assert model.training and all(layer.began is None for layer in pruner.layers.values())
    same(before, model.state_dict())


def test_the_original_of_an_adapter_that_has_learnt():
    """As from PEFT: teaching is what the run began with."""
    model = build()
    pruner = attached(model)
    for mask in pruner.masks.values():
        mask.logits.data.fill_(1.0)
    inputs = batch(3)
    want = logits(model, inputs)
    original = Original(pruner)
    prune(pruner, 0.5)
    with torch.no_grad():
        for layer in pruner.layers.values():
            layer.B.mul_(-1)
            layer.magnitude.mul_(2)
    assert difference(logits(model, inputs), want) > 0.05
    with original():
        got = model(**inputs).logits
    assert difference(got, want) < 1e-5


def test_an_error_inside_leaves_the_pupil():
    pruner, original = trained(build(), steps=1)
    head = pruner.model.classifier.weight
    with pytest.raises(Stop):
        with original():
            raise Stop
    assert pruner.model.classifier.weight is head and all(m.began is None for m in pruner.layers.values())


def test_no_original_once_channels_are_gone():
    pruner, original = trained(build())
    pruner.finalize()
    pruner.shrink()
    for f in (lambda: Original(pruner), lambda: original().__enter__()):
        with pytest.raises(RuntimeError, match="the pruned channels are dropped"):
            f()


# -- a vocabulary ----------------------------------------------------------------------------------------------


def divergence(pupil, teacher, weight, bias, t):
    """By definition, all logits at once."""
    p = F.softmax(F.linear(teacher, weight, bias).detach() / t, -1)
    log_q = F.log_softmax(F.linear(pupil, weight, bias) / t, -1)
    return t * t * (p * (p.log() - log_q)).sum(-1).mean()


@pytest.mark.parametrize("tokens,chunk", [(1, 7), (13, 5), (12, 4), (3, 100)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_vocabulary_loss(tokens, chunk, has_bias):
    g = torch.Generator().manual_seed(tokens)
    sizes = [(tokens, 6), (tokens, 6), (11, 6), (11,)]
    x, teacher, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in sizes)
    bias = bias if has_bias else None
    wanted = [x, weight] + ([bias] if has_bias else [])
    want = divergence(x, teacher, weight, bias, 2.0)
    got = vocabulary_loss(x, teacher, weight, bias, 2.0, chunk)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)  # logits are fp32 inside
    for a, b in zip(torch.autograd.grad(3 * got, wanted), torch.autograd.grad(3 * want, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_words_drawn_from_a_sure_teacher():
    """A teacher that knows the word: what is drawn is that word, its loss the usual one."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 5, generator=g)
    teacher = 100 * weight[[3, 7, 1]]
    words = (teacher @ weight.T).argmax(-1)
    x = torch.randn(3, 5, generator=g, requires_grad=True)
    got = vocabulary_loss(x, teacher, weight, None, chunk=2, draws=True)
    want = F.cross_entropy(x @ weight.T, words)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (got, want)))


def test_a_language_model_without_labels_never_makes_all_logits():
    """512 tokens, 61 words: neither the pupil's nor the teacher's logits are ever there as a whole."""
    model = tiny_decoders.build("llama", layers=1, max_position_embeddings=600)
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.2, warm_steps=0))
    taught = pk.Distillation("logits", chunk=64).of(pruner)
    taught.begin()
    prune(pruner, 0.2)
    model.train()
    inputs = {"input_ids": torch.randint(3, 61, (2, 256)), "attention_mask": torch.ones(2, 256, dtype=torch.long)}
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (tiny_decoders.VOCAB,):
                shapes.append(out.numel() // tiny_decoders.VOCAB)
            return out

    with Shapes():
        loss = model(**inputs).loss
        loss.backward()
    assert loss > 0 and max(shapes) < 512 and 64 in shapes
    taught.end()
    assert model(**inputs).logits.shape == (2, 256, tiny_decoders.VOCAB)


def test_a_language_model_s_loss_is_the_divergence():
    model = tiny_decoders.build("llama", layers=1)
    inputs = tiny_decoders.batch(3, 7)
    teacher = logits(model, inputs)
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.2, warm_steps=0))
    taught = pk.Distillation("logits", weight=0.5, temperature=2.0, chunk=4).of(pruner)
    taught.begin()
    prune(pruner, 0.3)
    taught.end()
    for mask in pruner.masks.values():
        mask.finalize(mask.kept())  # no noise in training
    pupil = logits(model, inputs)
    taught.begin()
    model.train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    both, alone = model(**inputs, labels=labels).loss, model(**inputs).loss
    taught.end()
    task = model(**inputs, labels=labels).loss
    kept = inputs["attention_mask"].bool()
    p, q = F.softmax(teacher[kept] / 2, -1), F.log_softmax(pupil[kept] / 2, -1)
    want = 0.5 * 4 * (p * (p.log() - q)).sum(-1).mean()
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both, task + want, rtol=1e-4, atol=1e-6)


# -- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["logits", "hidden"])
def test_without_labels_the_pruned_model_stays_near(on, tmp_path):
    """While all masks are on no rate moves anything; then the distance, which pruning opens, closes again."""
    options = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    stages = {"distil": on, "warm": 0.2, "stage_one": 0.5, "final_learning_rate": None}
    trainer = fresh(tmp_path, stages, Unlabelled(), options, max_steps=40, save_strategy="no", learning_rate=2e-2)
    warm = {}
    trainer.add_callback(Each(lambda step: warm.setdefault(step, {n: t.clone() for n, t in adapters(trainer.model)})))
    began = {n: t.clone() for n, t in adapters(trainer.model)}
    trainer.train()
    assert all(torch.equal(warm[4][n], began[n]) for n in began)
    assert not all(torch.equal(warm[6][n], began[n]) for n in began)
    distances = [entry["distillation"] for entry in trainer.state.log_history if "distillation" in entry]
    assert len(distances) == 36 and sum(distances[-5:]) / 5 < 0.5 * max(distances)
    assert not trainer.pruner.shrunk and pk.plan(trainer.model).sparsity() == pytest.approx(0.4, abs=0.02)


def adapters(model):
    return [(n, p.detach()) for n, p in model.named_parameters() if n.endswith((".A", ".B", ".magnitude"))]


def test_beside_labels_it_comes_in_when_masks_close(tmp_path):
    trainer = fresh(tmp_path, {"distil": "logits"}, save_strategy="no")
    trainer.train()
    seen = ["distillation" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert seen[0] is False and all(seen[2:])  # one warm step


def test_a_run_with_distillation_resumes(tmp_path):
    """The teacher is the run's beginning, of which a resumed run knows the frozen weights."""
    options = {"stages": {"distil": "hidden"}, "rows": Unlabelled(), "save_steps": 5}
    whole = fresh(tmp_path / "whole", **options)
    whole.train()
    again = fresh(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    same(result(whole), result(again))


def test_a_loss_that_is_not_the_model_s_is_noticed(tmp_path):
    """Trainer's label smoothing makes its own of the logits: the distillation loss would be lost."""
    trainer = fresh(tmp_path, {"distil": "logits", "warm": 0.0}, save_strategy="no", label_smoothing_factor=0.1)
    with pytest.raises(RuntimeError, match="the distillation loss got no gradient"):
        trainer.train()


def test_a_model_without_logits(tmp_path):
    pruner = pk.attach(build(task="base"), pk.PruneConfig(rank=2, sparsity=0.2))
    taught = pk.Distillation("logits").of(pruner)
    taught.begin()
    pruner.model.train()
    with pytest.raises(ValueError, match="DistilBertModel has no logits; use distil='hidden'"):
        pruner.model(**batch(2))
    taught.end()
    assert pruner.model(**batch(2)).last_hidden_state.shape[0] == 2


@pytest.mark.parametrize(
    "options,message",
    [
        ({"on": "all"}, r"on must be one of \('logits', 'hidden'\) \(got 'all'\)"),
        ({"weight": 0.0}, "weight and temperature must be positive, chunk at least 1 .got 0.0"),
        ({"temperature": float("nan")}, "must be positive"),
        ({"chunk": 0}, "chunk at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        pk.Distillation(**options)


def test_curvature_is_the_mean_square_over_draws():
    """Of a classifier, with respect to its logits: E[(p - y)(p - y)^T] over labels drawn from p is diag(p) - p p^T."""
    pruner = pk.attach(build(), pk.PruneConfig(rank=2, sparsity=0.2))
    taught = pk.Distillation("logits").of(pruner)
    g = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 3, generator=g)
    p = F.softmax(theirs, -1)[0]
    torch.manual_seed(0)
    total = torch.zeros(3, 3)
    draws = 4000
    for _ in range(draws):
        ours = theirs.clone().requires_grad_(True)
        loss = taught._curvature(pruner.model, {"logits": ours}, {"logits": theirs}, None)
        (grad,) = torch.autograd.grad(loss, ours)
        total += grad[0, :, None] * grad[0, None, :]
    want = torch.diag(p) - p[:, None] * p[None, :]
    assert (total / draws - want).abs().max() < 4 * 0.5 / draws**0.5
