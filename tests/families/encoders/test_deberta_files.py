"""Compact DeBERTa on disk, and as what other runtimes load."""

import copy

import pytest
import torch
import transformers

import prunekern as pk
import prunekern.hf
from prunekern.exporting.onnx import export_onnx
from prunekern.exporting.stock import save_stock
from tests.helpers.equal_models import F32
from tests.helpers.tiny_deberta import CLASSES, batch, build, compact, names
from tests.helpers.tiny_models import attached, difference, keep_only, logits

AUTO = {
    "base": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "question": "AutoModelForQuestionAnswering",
    "choice": "AutoModelForMultipleChoice",
}


@pytest.mark.parametrize("task", CLASSES)
def test_saved_and_loaded(task, tmp_path):
    small, inputs = compact(task=task, legacy=task != "masked_lm"), batch(task=task)
    with torch.no_grad():
        want = small(**inputs)[0]
        pk.save(small, tmp_path)
        for again in (pk.load(tmp_path), getattr(transformers, AUTO[task]).from_pretrained(tmp_path)):
            assert type(again) is type(small) and torch.equal(again(**inputs)[0], want)


@pytest.mark.parametrize("variant", ("v2 with convolution", "keys of positions", "plain"))
def test_other_variants_saved_and_loaded(variant, tmp_path):
    small = compact(variant)
    pk.save(small, tmp_path)
    assert torch.equal(logits(pk.load(tmp_path), batch()), logits(small, batch()))
    assert difference(logits(pk.load(tmp_path, weights="int8"), batch()), logits(small, batch())) < 0.1


def test_damaged_sizes_are_refused(tmp_path):
    small = compact("v2 with convolution")
    pk.save(small, tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert '"type_vocab_size": 2' in text
    config.write_text(text.replace('"type_vocab_size": 2', '"type_vocab_size": 0'))
    with pytest.raises(ValueError, match="type_vocab_size must be"):
        pk.load(tmp_path)


def test_plain_twin_and_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = compact("v3", "token")
    assert difference(logits(pk.plain_twin(small), batch()), logits(small, batch())) <= F32
    export_onnx(small, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for inputs in (batch(), batch(2, 17), batch(1, 5, padded=False)):
        got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
        seen = inputs["attention_mask"].bool()
        assert difference(torch.from_numpy(got)[seen], logits(small, inputs)[seen]) <= F32


def test_stock(tmp_path):
    model = build("v3", "token")
    pruner = attached(model, sparsity=0.15)
    pruner.finalize("stock")
    model.eval()
    save_stock(model, tmp_path)
    stock = transformers.DebertaV2ForTokenClassification.from_pretrained(tmp_path)
    assert stock.config.intermediate_size < model.config.intermediate_size
    assert difference(logits(stock, batch()), logits(model, batch())) <= F32


def test_heads_that_a_stock_config_cannot_say(tmp_path):
    model = build("v3", "token")
    pruner = attached(model)
    kept = torch.ones(48, dtype=torch.bool)
    kept[:12] = False  # one head of four
    keep_only(pruner, {names(i, "token")["v"]: kept.numpy() for i in (0, 1)})
    with pytest.raises(ValueError, match="keeps 3 of 4 heads, and a stock deberta-v2 config takes 4"):
        save_stock(copy.deepcopy(model), tmp_path / "stock")
