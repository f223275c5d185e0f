"""Several classes to a text, and a tag for every word, all the way: trained, compacted, in int8, scored again."""

import json
import sys

import pytest
import torch

import prunekern as pk
from prunekern import cli
from tests.helpers.dense_folders import WORDS, dense_folder

THINGS, NICE = ("film", "plot", "actor"), ("good", "great", "fine", "nice")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("types")
    dense_folder(folder / "dense")
    generator = torch.Generator().manual_seed(0)
    several, tagged = [], []
    for length in (3, 5, 9, 4, 7, 6) * 40:
        words = [WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)]
        several.append(f"{' '.join(words)},{'|'.join(w for w in NICE[:2] if w in words)}\n")
        tags = ["B-THING" if w in THINGS else "I-THING" if w in NICE else "O" for w in words]
        tagged.append({"tokens": words, "tags": tags})
    (folder / "several.csv").write_text("text,label\n" + "".join(several))
    (folder / "tagged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    (folder / "tagged.conll").write_text(
        "\n".join("".join(f"{w}\t{t}\n" for w, t in zip(r["tokens"], r["tags"], strict=True)) for r in tagged)
    )
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """(status, stdout, last line of stderr) of the command."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prunekern", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return end.value.code or 0, " ".join(shown.out.split()), (shown.err.splitlines() or [""])[-1]

    return call


def trained(run, files, out, *options, steps=60):
    common = ["--max-length", 16, "--threads", 1, "--batch-size", 16, "--lr", 1e-2, "--sparsity", 0.3]
    status, shown, err = run("train", "--model", files / "dense", "--out", out, "--max-steps", steps, *common, *options)
    assert status == 0, err
    return (
        shown,
        json.loads((out / "report.json").read_text())["score"],
        json.loads((out / "compact/config.json").read_text()),
    )


def test_tokens(files, tmp_path, run):
    out, data = tmp_path / "run", ["--data", files / "tagged.jsonl"]
    shown, score, config = trained(run, files, out, *data, "--quantize", "int8")
    assert config["architectures"] == ["DistilBertForTokenClassification"] and config.get("problem_type") is None
    assert config["id2label"] == {"0": "B-THING", "1": "I-THING", "2": "O"} and config["label2id"]["O"] == 2
    assert score["masked"] == pytest.approx(score["compact"], abs=1e-6)
    assert score["compact"]["accuracy"] > 0.95 > 0.5  # a word decides its tag
    assert (
        f"test entity_f1: {100 * score['masked']['entity_f1']:.2f} before removal" in shown and "warning" not in shown
    )
    fp32, int8 = (run("eval", out / "compact", *data, "--max-length", 16, "--weights", w)[1] for w in ("fp32", "int8"))
    for kind, found in (("compact", fp32), ("int8", int8)):
        for metric, value in score[kind].items():
            assert f"tagged.jsonl, test (24): {metric} {100 * value:.2f}" in found
    status, conll, _ = run("eval", out / "compact", "--data", files / "tagged.conll", "--max-length", 16)
    assert status == 0 and conll.replace("conll", "jsonl") == fp32
    cut = run("eval", out / "compact", *data, "--max-length", 8)[1]
    longer = sum(len(words) > 6 for words in pk.tasks.get(files / "tagged.jsonl").splits["test"]["tokens"])
    assert f"warning: {longer} of 24 rows of test are longer than --max-length 8 and are cut to it" in cut
    status, _, err = run("eval", out / "compact", "--data", files / "several.csv", "--label-separator", "|")
    assert status == 2 and "has no tensor" in err and "was not trained for" in err
    assert run("compact", files / "dense", out / "adapter", tmp_path / "again")[0] == 0
    one, two = (pk.load(folder) for folder in (out / "compact", tmp_path / "again"))
    assert type(one) is type(two) and one.config.id2label == two.config.id2label
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_several_classes(files, tmp_path, run):
    out, data = tmp_path / "run", ["--data", files / "several.csv", "--label-separator", "|", "--metric", "macro_f1"]
    shown, score, config = trained(run, files, out, *data, "--quantize", "int8", steps=20)
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    assert config["problem_type"] == "multi_label_classification" and config["label2id"] == {"good": 0, "great": 1}
    assert score["masked"] == pytest.approx(score["compact"], abs=1e-6) and list(score["int8"])[0] == "macro_f1"
    assert f"test macro_f1: {100 * score['masked']['macro_f1']:.2f} before removal" in shown
    found = run("eval", out / "compact", *data, "--max-length", 16, "--weights", "fp32")[1]
    for metric, value in score["compact"].items():
        assert f"several.csv, test (24): {metric} {100 * value:.2f}" in found
    rows = (files / "several.csv").read_text().splitlines()[1:]
    (tmp_path / "one.csv").write_text(
        "text,label\n" + "".join(f"{r.split(',')[0]},{n % 2}\n" for n, r in enumerate(rows))
    )
    status, _, err = run("eval", out / "compact", "--data", tmp_path / "one.csv", "--max-length", 16)
    assert status == 2 and "was trained for multi_label_classification, one.csv is single_label_classification" in err
    tags = [{"tokens": row.split(",")[0].split(), "tags": [n % 2] * len(row.split())} for n, row in enumerate(rows)]
    (tmp_path / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tags))
    status, _, err = run("eval", out / "compact", "--data", tmp_path / "tags.jsonl", "--max-length", 16)
    assert status == 2 and "was trained as DistilBertForSequenceClassification, tags.jsonl asks for Distil" in err


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("several.csv", ["--task-type", "many"], "task_type must be one of classification, regression, multi-label, "),
        ("several.csv", ["--task-type", "multi-label"], "several.csv line 2: label 'label' must be a list of classes"),
        ("several.csv", ["--task-type", "tokens"], "extension must, for tokens, be one of"),
        ("several.csv", ["--label-columns", "good,bad"], "column 'good' is missing; there are text, label"),
        ("several.csv", ["--label-columns", "good"], "label_columns must be two columns or more"),
        ("several.csv", ["--label", "text,label"], "label must be one column (got 'text,label')"),
        ("several.csv", ["--task-type", "tokens", "--classes"], "task_type must be 'classification' with regression"),
        ("tagged.jsonl", ["--task-type", "regression"], "column 'text' is missing; there are tokens, tags"),
        ("tagged.jsonl", ["--metric", "micro_f1"], "column 'text' is missing"),
        ("tagged.conll", ["--label", "ner"], "has no named columns"),
        ("odd.jsonl", [], "odd.jsonl line 1: 2 words, but 1 tags"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(files, tmp_path, run, data, options, message):
    (files / "odd.jsonl").write_text('{"tokens": ["a", "b"], "tags": ["O"]}\n')
    for command in (["train", "--model", files / "dense", "--out", tmp_path / "run"], ["eval", files / "dense"]):
        status, _, err = run(*command, "--data", files / data, *options)
        assert status == 2 and err.startswith("error: ") and message in err, err
    assert not (tmp_path / "run").exists()


def test_options_of_data_need_it(files, tmp_path, run):
    for option in ("--task-type", "--label-columns", "--label-separator"):
        status, _, err = run("train", "--model", files / "dense", "--out", tmp_path, "--task", "sst2", option, "tokens")
        assert status == 2 and option in err and "go with --data" in err
