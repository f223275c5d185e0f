"""Compact models of sentence-transformers trained in all they have kept, under the original or what it said once."""

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

import prunekern as pk
import prunekern.hf  # noqa: F401
from prunekern.nn import CompactLinear
from prunekern.training.kept import answers, map_answers, train_kept
from prunekern.training.recipe import TrainOptions
from prunekern.training.sentences import agreement, embed
from tests.helpers.tiny_sentences import cross_encoder, sentence_model, texts
from tests.helpers.trainer_runs import same

OPTIONS = TrainOptions(max_steps=40, batch_size=4, learning_rate=2e-3, save_steps=20, max_length=8, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(original, half of it as a folder)"""
    folder = tmp_path_factory.mktemp("models")
    original, model = sentence_model(folder / "dense"), sentence_model(folder / "dense")
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.5))
    pruner.finalize("uniform")
    pk.save(pk.compact(model), folder / "small")
    return original, folder / "small"


def test_embeddings_come_nearer_and_a_run_resumes(models, tmp_path):
    original, folder = models
    small = pk.load(folder)
    before = agreement(embed(small, texts()), embed(original, texts()))
    words = small[0].auto_model.embeddings.word_embeddings.weight.clone()
    found = train_kept(small, original, texts(), OPTIONS, tmp_path / "run")
    after = agreement(embed(small, texts()), embed(original, texts()))
    assert found["steps"] == 40 and found["history"]
    assert 1 - after["cosine"] < 0.3 * (1 - before["cosine"]) and after["spearman"] > before["spearman"]
    assert not any(p.requires_grad for p in small.parameters()) and not small.training
    assert torch.equal(small[0].auto_model.embeddings.word_embeddings.weight, words)
    # What was trained is what is packed, saved and loaded.
    pk.save(small, tmp_path / "trained")
    assert np.array_equal(embed(pk.load(tmp_path / "trained"), texts()), embed(small, texts()))

    (tmp_path / "half").mkdir()
    (tmp_path / "run" / "checkpoints" / "checkpoint-40").rename(tmp_path / "half" / "checkpoint-40")
    again = pk.load(folder)
    train_kept(again, original, texts(), OPTIONS, tmp_path / "run", resume=True)
    same(small.state_dict(), again.state_dict())
    finished = pk.load(folder)
    assert train_kept(finished, original, texts(), OPTIONS, tmp_path / "run", resume=True)["steps"] == 40
    same(small.state_dict(), finished.state_dict())
    with pytest.raises(ValueError, match="the run began with training rows '24, sha256 .*, to be resumed with '20"):
        train_kept(pk.load(folder), original, texts(20), OPTIONS, tmp_path / "run", resume=True)


def test_no_dropout_and_eager_attention_meanwhile(models, tmp_path, monkeypatch):
    """Both are what they were afterwards, also where training fails."""
    original, folder = models
    small, seen = pk.load(folder), []
    dropouts = [m for m in small.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.1

    def look(self, features, labels=None, **kwargs):
        seen.append((small.training, max(m.p for m in dropouts), small[0].auto_model.config._attn_implementation))
        raise RuntimeError("enough")

    monkeypatch.setattr(pk.DistilLoss, "forward", look)
    with pytest.raises(RuntimeError, match="enough"):
        train_kept(small, original, texts(), OPTIONS, tmp_path)
    assert seen == [(True, 0.0, "eager")]
    assert all(m.p == 0.1 for m in dropouts) and small[0].auto_model.config._attn_implementation == "sdpa"


def test_the_last_map_is_least_squares(models, tmp_path):
    """Of embeddings that a matrix made from the original's, the map is its inverse; a folder holds it."""
    original, folder = models
    some = [" ".join(texts()[i : i + 1 + i % 3]) for i in range(24)] + [a + " " + b for a, b in pairwise(texts())]
    taught = embed(original, some).astype(np.float32)
    small = pk.load(folder)
    own = embed(small, some)
    width = own.shape[1]
    ridge = 0.05 * len(own) / width * np.eye(width)
    want = own @ np.linalg.inv(own.T @ own + ridge) @ (own.T @ taught + ridge)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    assert map_answers(small, some, taught)
    np.testing.assert_allclose(embed(small, some), want, atol=1e-5)
    assert [type(m).__name__ for m in small.children()] == ["Transformer", "Pooling", "Dense", "Normalize"]
    pk.save(small, tmp_path / "mapped")
    np.testing.assert_allclose(embed(pk.load(tmp_path / "mapped"), some), want, atol=1e-5)
    named = SentenceTransformer(
        modules=OrderedDict(zip(("words", "mean", "unit"), pk.load(folder).children(), strict=True)), device="cpu"
    )
    assert map_answers(named, some, taught) and list(named._modules) == ["words", "mean", "unit_map", "unit"]
    np.testing.assert_allclose(embed(named, some), want, atol=1e-5)
    half = pk.load(folder).bfloat16()
    assert map_answers(half, some, taught) and np.isfinite(embed(half, some)).all()
    bare = SentenceTransformer(modules=list(pk.load(folder).children())[:2], device="cpu")
    assert not map_answers(bare, some, taught) and len(list(bare.children())) == 2


def test_answers_are_of_these_texts(models, tmp_path):
    original, _ = models
    file = tmp_path / "taught.npy"
    first = answers(original, texts(6), file, None)
    np.testing.assert_allclose(first, embed(original, texts(6)), atol=1e-6)
    assert first.dtype == np.float32
    np.save(file, first + 1)  # kept, and read
    np.testing.assert_allclose(answers(original, texts(6), file, None), first + 1)
    np.testing.assert_allclose(answers(original, texts(6)[::-1], file, None), first[::-1], atol=1e-6)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_teacher_beside_it(hidden, models):
    """The loss is its definition, of a compact model under another one."""
    original, folder = models
    small = pk.load(folder).requires_grad_(True)
    loss = pk.DistilLoss(small, teacher=original, hidden=hidden, cosines=1.0)
    features = small.preprocess(texts(5))
    original.train()  # and it is taught in eval mode all the same
    small.train()
    got = loss([dict(features)])
    assert original.training
    original.eval()
    small.eval()
    with torch.no_grad():
        ours, theirs = (m(dict(features))["sentence_embedding"] for m in (small, original))
        want = 1 - (ours * theirs).sum(1).mean() + 5 * (ours @ ours.T - theirs @ theirs.T).square().mean()
        if hidden:
            names = {"input_ids", "attention_mask", "token_type_ids"}
            inputs = {k: v for k, v in features.items() if k in names}
            shown = inputs["attention_mask"].bool()
            states = [m[0].auto_model(**inputs, output_hidden_states=True).hidden_states for m in (small, original)]
            parts = [
                (a[shown] - b[shown]).square().mean() / b[shown].square().mean()
                for a, b in zip(states[0][1:], states[1][1:], strict=True)
            ]
            want = want + torch.stack(parts).mean()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.backward()
    assert any(m.weight.grad is not None for m in small.modules() if isinstance(m, CompactLinear))
    assert all(p.grad is None for p in original.parameters())
    assert not any("teacher" in name for name, _ in loss.named_parameters())


def test_a_teacher_is_asked_whatever_labels_say(models, tmp_path):
    """Data of CrossEncoders nearly always have labels of another task."""
    original = cross_encoder(tmp_path / "dense")
    pairs, labels = [["the cat sat", "a dog"], ["on a mat", "songs of spring"]], torch.tensor([0.0, 1.0])
    for loss in (
        pk.DistilLoss(original, teacher=cross_encoder(tmp_path / "dense")),
        pk.DistilLoss(original, pk.attach(original, pk.PruneConfig(rank=2, warm_steps=0))),
    ):
        torch.testing.assert_close(loss(pairs, labels), loss(pairs))


def test_texts_longer_than_one_of_both_reads(models, tmp_path, monkeypatch):
    """Both read as much as the one that reads less, and afterwards what they read before."""
    original, folder = models
    small, seen = pk.load(folder), []
    small.max_seq_length = 6
    forward = pk.DistilLoss.forward

    def look(self, features, labels=None, **kwargs):
        seen.append((small.max_seq_length, original.max_seq_length))
        return forward(self, features, labels, **kwargs)

    monkeypatch.setattr(pk.DistilLoss, "forward", look)
    train_kept(small, original, texts(), replace(OPTIONS, max_steps=2), tmp_path)
    assert set(seen) == {(6, 6)} and (small.max_seq_length, original.max_seq_length) == (6, 12)


def test_another_original_or_model_is_seen(models, tmp_path):
    original, folder = models
    answers(original, texts(6), tmp_path / "taught.npy", None)
    other = sentence_model(tmp_path / "dense")
    with torch.no_grad():
        other[0].auto_model.embeddings.word_embeddings.weight.neg_()
    np.testing.assert_allclose(
        answers(other, texts(6), tmp_path / "taught.npy", None), embed(other, texts(6)), atol=1e-6
    )
    options = replace(OPTIONS, max_steps=2, save_steps=1)
    train_kept(pk.load(folder), original, texts(), options, tmp_path / "run")
    changed = pk.load(folder)
    with torch.no_grad():
        next(m for m in changed.modules() if isinstance(m, CompactLinear)).weight.mul_(2)
    with pytest.raises(ValueError, match="the run began with model '.*', to be resumed with"):
        train_kept(changed, original, texts(), options, tmp_path / "run", resume=True)


def test_prompts_are_not_trained_on(models, tmp_path):
    original, _ = models
    plain = answers(original, texts(6), tmp_path / "a.npy", None)
    original.default_prompt_name = "query"
    try:
        np.testing.assert_array_equal(answers(original, texts(6), tmp_path / "b.npy", None), plain)
    finally:
        original.default_prompt_name = None


def test_labels_are_the_teachers_answers(models):
    original, folder = models
    small = pk.load(folder)
    features, taught = small.preprocess(texts(5)), original.encode(texts(5), convert_to_tensor=True)
    beside = pk.DistilLoss(small, teacher=original, hidden=0.0)
    torch.testing.assert_close(
        pk.DistilLoss(small)([dict(features)], 3 * taught), beside([dict(features)]), rtol=1e-4, atol=1e-5
    )


def test_their_trainer_with_a_column_of_embeddings(models, tmp_path):
    original, folder = models
    small = pk.load(folder).requires_grad_(True)
    before = agreement(embed(small, texts()), embed(original, texts()))["cosine"]
    rows = Dataset.from_dict({"text": texts(), "label": list(original.encode(texts()))})
    args = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=4, learning_rate=2e-3, report_to=[], use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(small, args, train_dataset=rows, loss=pk.DistilLoss(small)).train()
    assert agreement(embed(small.eval(), texts()), embed(original, texts()))["cosine"] > before


def test_a_cross_encoder_under_labels(tmp_path):
    original = cross_encoder(tmp_path / "dense")
    loss, pairs = pk.DistilLoss(original), [["the cat sat", "a dog"], ["on a mat", "songs of spring and hills"]]
    scores = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        features = original.preprocess(list(zip(*pairs, strict=True)))
        own = original(features)["scores"].flatten()
        assert loss(pairs, scores) == pytest.approx(float((own - scores).square().mean()), rel=1e-5)


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_teach(models, tmp_path):
    original, folder = models
    small = pk.load(folder)
    with pytest.raises(ValueError, match="teacher must be another SentenceTransformer, .*got CrossEncoder"):
        pk.DistilLoss(small, teacher=cross_encoder(tmp_path / "dense"))
    with pytest.raises(ValueError, match="also needs a pruner or a teacher beside it"):
        pk.DistilLoss(small, also=torch.nn.Identity())
    with pytest.raises(ValueError, match="the model itself"):
        pk.DistilLoss(small, teacher=small)
    model = sentence_model(tmp_path / "other")
    pruner = pk.attach(model, pk.PruneConfig(rank=2))
    with pytest.raises(ValueError, match="and no pruner given .*and a pruner"):
        pk.DistilLoss(model, pruner, teacher=original)
    loss, features = pk.DistilLoss(small), small.preprocess(texts(5))
    with pytest.raises(ValueError, match="without pruner and teacher, data must have a column 'label'"):
        loss([dict(features)])
    for labels, columns in ((torch.ones(5), 1), (torch.ones(5, 48, dtype=torch.int64), 1), (torch.ones(5, 48), 2)):
        with pytest.raises(ValueError, match=r"labels must be what the teacher gives of one column of texts, floats"):
            loss([dict(features)] * columns, labels)
    with pytest.raises(ValueError, match="distil must be a loss of the same pruner"):
        pk.PruneCallback(pruner, distil=loss)
    with pytest.raises(ValueError, match="train_kept: small must be compact"):
        train_kept(original, original, texts(), OPTIONS, tmp_path)
    with pytest.raises(ValueError, match=r"texts must be at least 4, one batch \(got 3\)"):
        train_kept(small, original, texts(3), OPTIONS, tmp_path)
