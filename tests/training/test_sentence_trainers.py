"""SentenceTransformerTrainer and CrossEncoderTrainer prune by callback, with labels or by distillation alone."""

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

import prunekern as pk
import prunekern.hf  # noqa: F401
from prunekern.training.recipe import TrainOptions
from prunekern.training.sentences import ByLength, distil_sentences, read_texts
from tests.helpers.callback_runs import STAGES
from tests.helpers.tiny_sentences import cross_encoder, sentence_model, texts
from tests.helpers.trainer_runs import same

CONFIG = pk.PruneConfig(rank=2, sparsity=0.4)
OPTIONS = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
OPTIONS |= {"save_steps": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 7}
OPTIONS |= {"dataloader_pin_memory": False}


def pairs(count=16):
    some = texts(2 * count)
    labels = [float(i % 2) for i in range(count)]
    return Dataset.from_dict({"sentence1": some[:count], "sentence2": some[count:], "label": labels})


def sentence_trainer(folder, dense, distils=True, **options):
    model = sentence_model(dense)
    pruner = pk.attach(model, CONFIG)
    task = CosineSimilarityLoss(model)
    loss = pk.DistilLoss(model, pruner) if distils else task
    args = SentenceTransformerTrainingArguments(output_dir=str(folder), **OPTIONS | options)
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": texts()}) if distils else pairs(),
        loss=loss,
        callbacks=[pk.PruneCallback(pruner, **STAGES, distil=loss if distils else None)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.pruner = pruner
    return trainer


@pytest.mark.parametrize("distils", [True, False])
def test_a_sentence_transformer(distils, tmp_path):
    """Trained, stopped and resumed before and after the boundary, compacted, saved, loaded: the same embeddings."""
    whole = sentence_trainer(tmp_path / "whole", tmp_path / "dense", distils)
    whole.train()
    assert whole.pruner.finalized and whole.pruner.shrunk == (not distils)
    for step in (4, 8):
        again = sentence_trainer(tmp_path / "again", tmp_path / "dense", distils)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        same(whole.model.state_dict(), again.model.state_dict())
    small = pk.compact(whole.model.eval())
    want = whole.model.encode(texts(5), convert_to_tensor=True)
    got = small.encode(texts(5), convert_to_tensor=True)
    assert (got - want).abs().max() < 1e-4
    assert pk.plan(small).sparsity() == pytest.approx(0.4, abs=0.02)


def test_the_distillation_loss_is_its_definition(tmp_path):
    model = sentence_model(tmp_path / "dense")
    theirs = model.encode(texts(6), convert_to_tensor=True)
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.4, warm_steps=0))
    loss = pk.DistilLoss(model, pruner, cosines=0.5, hidden=0.0)
    with torch.no_grad():
        for mask in pruner.masks.values():
            mask.finalize(torch.arange(mask.logits.numel()) % 3 > 0)
    ours = model.eval().encode(texts(6), convert_to_tensor=True)
    features = [model.preprocess(texts(4)), model.preprocess(texts(6)[4:])]  # two columns
    model.train()
    got = loss(features)
    cosines = (ours @ ours.T - theirs @ theirs.T).square().mean()
    want = 1 - (ours * theirs).sum(1).mean() + 0.5 * 6 * cosines
    assert float(want) > 0.01
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert all("sentence_embedding" not in f for f in features)


def test_beside_another_loss(tmp_path):
    """The task alone while all masks are on; then both."""
    model = sentence_model(tmp_path / "dense")
    pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.4, warm_steps=2))
    loss = pk.DistilLoss(model, pruner, CosineSimilarityLoss(model), weight=2.0)
    batch = pairs(4)
    columns = [model.preprocess(batch[name]) for name in ("sentence1", "sentence2")]
    labels = torch.tensor(batch["label"])
    model.train()
    task = CosineSimilarityLoss(model)([dict(f) for f in columns], labels)
    torch.testing.assert_close(loss([dict(f) for f in columns], labels), task)
    pruner.schedule(0, 1)
    pruner.finalize("uniform")
    task = CosineSimilarityLoss(model)([dict(f) for f in columns], labels)
    alone = pk.DistilLoss(model, pruner)
    alone._original = loss._original
    both = loss([dict(f) for f in columns], labels)
    torch.testing.assert_close(both, task + 2 * alone([dict(f) for f in columns]))


@pytest.mark.parametrize("distils", [True, False])
def test_a_cross_encoder(distils, tmp_path):
    model = cross_encoder(tmp_path / "dense")
    pruner = pk.attach(model, CONFIG)
    task = BinaryCrossEntropyLoss(model)
    loss = pk.DistilLoss(model, pruner) if distils else task
    args = CrossEncoderTrainingArguments(output_dir=str(tmp_path / "out"), **OPTIONS)
    data = pairs().remove_columns("label") if distils else pairs()
    trainer = CrossEncoderTrainer(
        model,
        args,
        train_dataset=data,
        loss=loss,
        callbacks=[pk.PruneCallback(pruner, **STAGES, distil=loss if distils else None)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()
    asked = [("the cat sat", "on a mat"), ("a dog", "songs of spring and hills")]
    want = model.eval().predict(asked)
    small = pk.compact(model)
    assert abs(small.predict(asked) - want).max() < 1e-4
    pk.save(small, tmp_path / "small")
    again = pk.load(tmp_path / "small", weights="int8")
    assert type(again).__name__ == "CrossEncoder" and abs(again.predict(asked) - want).max() < 0.1


def test_texts_alone(tmp_path):
    """What `prunekern train --task embeddings` does."""
    model = sentence_model(tmp_path / "dense")
    options = TrainOptions(max_steps=10, batch_size=4, learning_rate=1e-2, save_steps=4, max_length=8)
    pruner, report = distil_sentences(model, texts(), CONFIG, options, tmp_path / "run")
    assert report["steps"] == 10 and pruner.sparsity() == pytest.approx(0.4, abs=0.02)
    assert [h["step"] for h in report["history"]] == [10]
    again = sentence_model(tmp_path / "dense")
    resumed, _ = distil_sentences(again, texts(), CONFIG, options, tmp_path / "run", resume=True)
    assert resumed.steps == 10
    other = pk.PruneConfig(rank=2, sparsity=0.3)
    with pytest.raises(ValueError, match="the run began with sparsity 0.4, to be resumed with 0.3"):
        distil_sentences(sentence_model(tmp_path / "dense"), texts(), other, options, tmp_path / "run", resume=True)


def test_batches_of_like_length():
    some = texts(200)
    data = Dataset.from_dict({"text": some})
    sampler = ByLength(data, 8, seed=3)
    first = list(sampler)
    assert sorted(i for batch in first for i in batch) == list(range(200)) and len(first) == len(sampler) == 25
    assert list(ByLength(data, 8, seed=3)) == first and list(ByLength(data, 8, seed=4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = sum(max(len(some[i]) for i in b) - min(len(some[i]) for i in b) for b in first) / 25
    assert spread < 20
    assert len(list(ByLength(data, 7, drop_last=True))) == len(ByLength(data, 7, drop_last=True)) == 28


# -- refusals --------------------------------------------------------------------------------------------------


def test_texts_that_are_none(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\n  \n\t\n")
    with pytest.raises(ValueError, match="texts.txt: holds no text: 3 lines, all of them empty"):
        read_texts(file)
    file.write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"must be UTF-8 \(invalid start byte at byte 2\)"):
        read_texts(file)
    with pytest.raises(FileNotFoundError, match="expected a text a line"):
        read_texts(tmp_path / "none.txt")
    file.write_text("\ufeffone\n\n two \n")
    assert read_texts(file) == ["one", "two"]
    with pytest.raises(ValueError, match=r"texts must be at least 4, one batch \(got 2\)"):
        distil_sentences(sentence_model(tmp_path / "dense"), ["a", "b"], CONFIG, TrainOptions(batch_size=4), tmp_path)


def test_losses_of_other_models(tmp_path):
    model = sentence_model(tmp_path / "dense")
    pruner = pk.attach(model, CONFIG)
    with pytest.raises(TypeError, match="DistilLoss: model must be one of sentence-transformers"):
        pk.DistilLoss(pruner.model, pruner)
    other = sentence_model(tmp_path / "dense")
    with pytest.raises(ValueError, match="DistilLoss: pruner must be that of the model"):
        pk.DistilLoss(other, pruner)
    loss = pk.DistilLoss(model, pruner)
    with pytest.raises(ValueError, match="distil must be a loss of the same pruner"):
        pk.PruneCallback(pk.attach(other, CONFIG), distil=loss)
    with pytest.raises(ValueError, match="weight must be positive, cosines and hidden not negative"):
        pk.DistilLoss(model, pruner, weight=-1)
