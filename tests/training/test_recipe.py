"""One seed, one run: the head that a checkpoint lacks, and what training makes of it."""

import shutil

import pytest
import torch

import prunekern as pk
from prunekern import tasks
from prunekern.training.recipe import TrainOptions, fine_tune, load_dense
from tests.cli.test_commands import files  # noqa: F401  (a tiny model, its tokenizer and a task)


def train(folder, out, seed, resume=False, rows="train", **changes):
    task = tasks.get(folder / f"{rows}.jsonl", text="text", label="label", validation=folder / "validation.jsonl")
    model, tokenizer = load_dense(str(folder / "dense"), task, seed)
    head = model.classifier.weight.detach().clone()
    defaults = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-3, "max_length": 16, "save_steps": 3, "seed": seed}
    options = TrainOptions(**defaults | changes)
    pruner, _ = fine_tune(model, tokenizer, task, pk.PruneConfig(rank=2, seed=seed), options, out, resume)
    return head, pruner


def test_a_seed_fixes_head_masks_and_weights(files, tmp_path):  # noqa: F811
    torch.set_num_threads(1)
    runs = [train(files, tmp_path / str(i), seed) for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    first, second, other = (run[1].model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[0][1].plan() == runs[1][1].plan()
    logits = [name for name in first if name.endswith("mask.logits")]  # plans of so small a model may well agree
    assert logits and not any(torch.equal(first[name], other[name]) for name in logits)


def test_resume_without_a_checkpoint_starts_again(files, tmp_path):  # noqa: F811
    torch.set_num_threads(1)
    first, second = (train(files, tmp_path / str(r), 3, resume=r)[1].model.state_dict() for r in (False, True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_beside_the_checkpoints_of_another_is_refused(files, tmp_path):  # noqa: F811
    """Trainer would delete the new ones, of the lower steps, and a later resume go on from the old."""
    torch.set_num_threads(1)
    train(files, tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of an earlier run; go on from it \(--resume"):
        train(files, tmp_path, 3)


def test_resumed_as_it_began_or_not_at_all(files, tmp_path):  # noqa: F811
    torch.set_num_threads(1)
    _, pruner = train(files, tmp_path, 3)
    want = pruner.model.state_dict()
    for changes, name in (({"learning_rate": 2e-3}, "learning_rate"), ({"rows": "test"}, "task")):
        with pytest.raises(ValueError, match=f"the run began with {name} .*; resume it as it began"):
            train(files, tmp_path, 3, resume=True, **changes)
    shutil.copy(files / "test.jsonl", tmp_path / "train.jsonl")
    shutil.copy(files / "validation.jsonl", tmp_path)
    shutil.copytree(files / "dense", tmp_path / "dense")
    with pytest.raises(ValueError, match="the run began with training rows "):
        train(tmp_path, tmp_path, 3, resume=True)
    again = train(files, tmp_path, 3, resume=True, save_steps=2)[1].model.state_dict()
    assert all(torch.equal(want[name], again[name]) for name in want)
