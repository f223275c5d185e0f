"""One seed, one run: the head that a checkpoint lacks, and what training makes of it."""

import torch
from test_cli import files  # noqa: F401  (a tiny model, its tokenizer and a task)

import prunekern as pk
from prunekern import tasks
from prunekern.recipe import TrainOptions, fine_tune, load_dense


def train(folder, out, seed, resume=False):
    task = tasks.get(folder / "train.jsonl", text="text", label="label", validation=folder / "validation.jsonl")
    model, tokenizer = load_dense(str(folder / "dense"), task, seed)
    head = model.classifier.weight.detach().clone()
    options = TrainOptions(max_steps=6, batch_size=8, learning_rate=1e-3, max_length=16, seed=seed)
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
