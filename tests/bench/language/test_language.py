"""bench/language/compare.py: Taylor's rule by its definition, the mixture of the training text, and the table."""

import numpy as np
import pytest
import torch

from bench.common.rules import taylor
from bench.language.compare import MIXTURE, blocks
from bench.language.tables import METHODS, paired, path_of, rows_of
from prunekern import families
from prunekern.tasks.choice import Item, choice_task
from prunekern.tasks.language import language_task
from tests.helpers.tiny_decoders import VOCAB, build
from tests.helpers.tiny_tokenizer import WORDS, word_tokenizer


def test_taylor_is_weight_times_gradient_summed_over_the_group():
    model = build(vocab_size=VOCAB, dtype=torch.float64).requires_grad_(False)
    table = families.of(model).table(model)
    ids = torch.randint(5, VOCAB, (3, 1, 9), generator=torch.Generator().manual_seed(0))
    scores = taylor(model, table, [{"input_ids": i, "labels": i} for i in ids])
    assert all(p.grad is None for p in model.parameters())
    model.requires_grad_(True)
    sum(model(input_ids=i, labels=i).loss for i in ids).backward()
    weights = {n: m.weight for n, m in model.named_modules() if n in table.layers}
    for carrier, group in table.groups.items():
        for i in (0, group.count - 1):
            want = 0.0
            for name, rows in {carrier: group.rows, **group.removed_rows}.items():
                want += (weights[name][rows[i]] * weights[name].grad[rows[i]]).abs().sum().item()
            for name, cols in group.removed_cols.items():
                want += (weights[name][:, cols[i]] * weights[name].grad[:, cols[i]]).abs().sum().item()
            assert scores[carrier][i] == pytest.approx(want, rel=1e-9), carrier


def test_the_training_text_is_the_mixture(monkeypatch):
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (20,), generator=g)) for _ in range(40)]
    items = [Item([t, "no"], [" right", " wrong"], 0) for t in texts]
    made = {
        "wikipedia": language_task("it", dict.fromkeys(("train", "validation", "test"), texts)),
        "winogrande": choice_task("it", dict.fromkeys(("train", "validation", "test"), items)),
        "science": choice_task("it", dict.fromkeys(("train", "validation", "test"), items[::-1])),
    }
    monkeypatch.setattr("bench.language.compare.tasks.get", made.__getitem__)
    found = blocks(word_tokenizer(), 40, 8)
    assert len(found) == 40 and all(len(ids) == 8 for ids in found["input_ids"])
    first = word_tokenizer()(texts[0])["input_ids"][:8]
    for name, share in MIXTURE.items():
        at = {"wikipedia": 0, "winogrande": 20, "science": 30}[name]
        assert share == {0: 0.5, 20: 0.25, 30: 0.25}[at]
        assert (found[at]["input_ids"] == first) == (name != "science")  # whose first text is the last one
    with pytest.raises(SystemExit, match="blocks of 8 tokens, 4000 wanted"):
        blocks(word_tokenizer(), 8000, 8)


def run(method, share, perplexity, correct):
    bits = {task: np.packbits(np.asarray(c, bool)).tobytes().hex() for task, c in correct.items()}
    return {
        "method": method, "share": share, "seed": 0, "removed": share, "perplexity": perplexity, "right": bits,
        "items": {t: len(c) for t, c in correct.items()},
        "accuracy": {t: float(np.mean(c)) for t, c in correct.items()},
    }  # fmt: skip


def test_the_table():
    runs = [
        run("dense", 0.0, 20.0, {"a": [1, 1, 1, 0], "b": [1] * 9}),
        run("ours", 0.2, 25.0, {"a": [1, 1, 0, 0], "b": [1] * 9}),
        run("random", 0.2, 50.0, {"a": [0, 0, 0, 0], "b": [1] * 9}),
    ]
    dense, ours, random = rows_of(runs)
    assert (dense["x_dense"], ours["x_dense"], random["x_dense"]) == (1.0, 1.25, 2.5)
    assert (dense["mean_%"], ours["mean_%"], random["mean_%"]) == (87.5, 75.0, 50.0)
    assert dense["ours_minus_it"] is None and ours["ours_minus_it"] is None  # nothing of that share; itself
    mean, low, high = paired(runs[1], runs[2])
    assert mean == 25.0 and 0 <= low < mean < high <= 50
    assert random["ours_minus_it"].startswith("+25.00")


def test_every_run_has_a_name_of_its_own(tmp_path):
    every = [path_of(tmp_path, name, share, seed) for name, s in METHODS.items() for share in s for seed in (0, 1)]
    assert len(set(every)) == len(every)
