"""bench/accuracy/precision.py: every text is answered once, and answers are compared with the same model in fp32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import prunekern as pk
from bench.accuracy import precision
from tests.helpers import tiny_models


def texts(rows: list[list[int]], batch: int, length: int) -> precision.Texts:
    splits = {"test": {"input_ids": rows, "labels": [0] * len(rows)}}
    task = SimpleNamespace(encode=lambda tokenizer, length: splits)
    return precision.Texts(task, SimpleNamespace(pad_token_id=9), "test", batch, length)


def test_every_text_is_answered_once_in_its_place():
    it = texts([[1], [2, 2], [3, 3, 3], [4, 4], [5]], batch=2, length=3)
    found = precision.answers(lambda: (it.ids * it.mask).sum(1, keepdim=True), it)
    assert found.flatten().tolist() == [1, 4, 9, 8, 5]  # without padding, the last batch without its repetition


def test_what_is_not_text_is_padding():
    it = texts([[1, 1, 1], [2]], batch=2, length=3)
    assert it.ids.tolist() == [[1, 1, 1], [2, 9, 9]] and it.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    ids = it.ids
    assert it.fill(1) == 1 and it.ids is ids and ids.tolist() == [[2, 9, 9], [2, 9, 9]]


def test_answers_are_held_to_the_same_model_in_fp32():
    labels = torch.tensor([0, 0, 1, 1])
    dense = torch.tensor([[2.0, 1], [2, 1], [1, 2], [1, 2]])
    small = torch.tensor([[2.0, 1], [1, 2], [1, 2], [1, 2]])
    other = torch.tensor([[2.0, 1], [1, 2], [2, 1], [1, 2]])
    logits = {("dense", "eager", "fp32"): dense, ("compact", "ours", "fp32"): small, ("compact", "ours", "int8"): other}
    rows = precision.rows_of(logits, labels, dict.fromkeys(logits, 0.002))
    told = [(r["accuracy_%"], r["minus_fp32"], r["same_predictions_%"], r["ms"]) for r in rows]
    assert told == [(100.0, 0.0, 100.0, 2.0), (75.0, 0.0, 100.0, 2.0), (50.0, -25.0, 75.0, 2.0)]
    assert rows[0]["SQNR_dB"] is None and 0 < rows[2]["SQNR_dB"] < 20


@pytest.mark.parametrize("sparsity", [0.0, 0.25])
def test_a_dense_model_is_one_from_which_nothing_was_removed(tmp_path, sparsity):
    model = tiny_models.build("distilbert")
    pruner = pk.attach(model, pk.PruneConfig(sparsity=sparsity))
    for mask in pruner.masks.values():
        mask.logits.data = torch.randn(mask.logits.shape, generator=torch.Generator().manual_seed(0))
    pruner.finalize()
    pk.save(pk.compact(pruner.model), tmp_path / "it")
    if sparsity:
        with pytest.raises(SystemExit, match="--dense: channels were removed from .*it"):
            precision.dense_model(tmp_path / "it")
        return
    stock = precision.dense_model(tmp_path / "it")
    inputs = tiny_models.batch()
    assert type(stock.distilbert.transformer.layer[0].ffn.lin1) is torch.nn.Linear
    torch.testing.assert_close(stock(**inputs).logits, pk.load(tmp_path / "it")(**inputs).logits)


def test_a_folder_that_is_not_there_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["precision", "--compact", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        precision.parse()
    assert "--compact: no model in nowhere" in capsys.readouterr().err
