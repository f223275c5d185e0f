"""lm-eval's commonsense tasks on local files: what a user gets wrong."""

import json
import logging
import sys

import pytest
import torch
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration

import prunekern as pk
from prunekern.tasks.harness import evaluate_tasks
from tests.helpers.harness_items import RECORDS, character_tokenizer, decoder, write
from tests.helpers.tiny_decoders import build


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    for name, records in RECORDS.items():
        write(folder, name, records)
    return folder


@pytest.fixture(scope="module")
def model():
    return decoder(dtype=torch.float64, seed=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, r"names must be one or more different tasks \(got \[\]\)"),
        ({"names": ["boolq", "boolq"]}, "names must be one or more different tasks"),
        ({"names": ["hellaswagg"]}, r"no task 'hellaswagg'; among its \d+ are hellaswag"),
        ({"names": ["commonsense"]}, "no task 'commonsense'"),
        ({"names": ["mmlu"]}, "'mmlu' is a group of lm-eval's tasks"),
        ({"names": ["gsm8k"]}, "'gsm8k' is not a multiple-choice task"),
        ({"limit": 0}, r"limit must be an integer, at least 1 \(got 0\)"),
        ({"limit": 0.5}, r"limit must be an integer, at least 1 \(got 0.5\)"),
        ({"limit": True}, r"limit must be an integer, at least 1 \(got True\)"),
        ({"batch_size": 0}, r"batch_size must be an integer, at least 1 \(got 0\)"),
        ({"batch_size": "auto"}, r"batch_size must be an integer, at least 1 \(got 'auto'\)"),
        ({"num_fewshot": -1}, r"num_fewshot must be an integer, at least 0 \(got -1\)"),
        ({"num_fewshot": 1}, r"boolq: has no train.jsonl, .* there is validation.jsonl"),
        ({"names": ["sciq"]}, r"has no folder 'sciq'; there are arc_challenge, arc_easy, boolq, hellaswag"),
    ],
)
def test_arguments(changes, message, model, tokenizer, local):
    arguments = {"names": ["boolq"], "local": local} | changes
    with pytest.raises(ValueError, match=message) as raised:
        evaluate_tasks(model, tokenizer, **arguments)
    assert "\n" not in str(raised.value)


def test_only_causal_language_models(tokenizer, local):
    tiny = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    for model in (
        build(task="sequence"),
        build(task="base"),
        torch.nn.Linear(2, 2),
        T5ForConditionalGeneration(T5Config(**tiny)),
    ):
        with pytest.raises(ValueError, match=rf"causal language model \(got {type(model).__name__}\)"):
            evaluate_tasks(model, tokenizer, "boolq", local)


def test_a_folder_that_is_not_there(model, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        evaluate_tasks(model, tokenizer, "boolq", tmp_path / "nowhere")


GOOD = json.dumps(RECORDS["boolq"][0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("boolq", "", r"validation.jsonl: must hold at least 1 items \(got 0\)"),
        ("boolq", GOOD + "\n{]\n", "validation.jsonl line 2: not JSON"),
        ("boolq", GOOD + "\n\n[1]\n", "validation.jsonl line 3: expected a JSON object, got list"),
        ("boolq", GOOD.replace("passage", "text"), "boolq: is not of the schema of aps/super_glue .*passage"),
        ("boolq", GOOD.replace('"label": 1', '"label": 2'), "boolq: is not of the schema of aps/super_glue"),
        ("boolq", GOOD + "\n" + GOOD.replace('"label": 1', '"label": 2'), r"item 2: answer .* 2 choices \(got 2\)"),
        ("boolq", GOOD + "\n" + GOOD.replace('"label": 1', '"label": -1'), r"item 2: answer .*\(got -1\)"),
        ("winogrande", json.dumps(RECORDS["winogrande"][0] | {"answer": ""}), "winogrande: is not of the schema"),
        (
            "arc_easy",
            "\n".join(json.dumps(r) for r in (RECORDS["arc_easy"][0], RECORDS["arc_easy"][0] | {"answerKey": "E"})),
            "arc_easy: item 2: ValueError",
        ),
    ],
)
def test_files(name, text, message, model, tokenizer, tmp_path):
    write(tmp_path, name, []).write_text(text)
    bars, levels = tqdm.__init__, [logging.getLogger(n).level for n in ("lm_eval", "datasets")]
    with pytest.raises(pk.tasks.DataError, match=message) as raised:
        evaluate_tasks(model, tokenizer, name, tmp_path)
    assert "\n" not in str(raised.value)
    assert tqdm.__init__ is bars and [logging.getLogger(n).level for n in ("lm_eval", "datasets")] == levels


def test_without_lm_eval(model, tokenizer, local, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'prunekern\[eval\]'"):
        evaluate_tasks(model, tokenizer, "boolq", local)
