"""Several classes to a text: however files hold them, one task; and what they must not hold, by file and line."""

import csv
import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from prunekern import tasks
from prunekern.tasks import metrics

SETS = [["sport"], ["economy", "sport"], [], ["politics"], ["economy"]] * 8


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(path, sets=SETS):
    return lines(path, [{"text": f"t{n}", "label": label} for n, label in enumerate(sets)])


def table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


def contents(task):
    """{text: names of its classes}."""
    return {
        text: [name for name, bit in zip(task.label_names, bits, strict=True) if bit]
        for data in task.splits.values()
        for text, bits in zip(data["text"], data[task.label_column], strict=True)
    }


def is_sets(task):
    assert isinstance(task, tasks.MultiLabelTask) and task.task_type == "multi-label" and task.metric == "micro_f1"
    assert contents(task) == {f"t{n}": sorted(label) for n, label in enumerate(SETS)}
    return task


def test_every_format_is_the_same_task(tmp_path):
    import pyarrow
    import pyarrow.parquet

    is_sets(tasks.get(listed(tmp_path / "a.jsonl")))
    texts = [f"t{n}" for n in range(len(SETS))]
    (tmp_path / "a.json").write_text(json.dumps([{"text": t, "label": s} for t, s in zip(texts, SETS, strict=True)]))
    is_sets(tasks.get(tmp_path / "a.json"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": SETS}), tmp_path / "a.parquet")
    is_sets(tasks.get(tmp_path / "a.parquet", task_type="multi-label"))
    rows = [(t, "|".join(s)) for t, s in zip(texts, SETS, strict=True)]
    for name in ("a.csv", "a.tsv"):
        is_sets(tasks.get(table(tmp_path / name, ("text", "label"), rows), label_separator="|"))
    is_sets(tasks.get(lines(tmp_path / "b.jsonl", [{"text": t, "label": s} for t, s in rows]), label_separator="|"))
    classes = ("economy", "politics", "sport")
    bits = [(t, *(int(c in s) for c in classes)) for t, s in zip(texts, SETS, strict=True)]
    is_sets(tasks.get(table(tmp_path / "c.csv", ("text", *classes), bits), label_columns=classes))
    words = [{"text": t} | {c: bool(b) for c, b in zip(classes, row, strict=True)} for t, *row in bits]
    is_sets(tasks.get(lines(tmp_path / "c.jsonl", words), label_columns=classes))


def test_lists_of_numbers(tmp_path):
    """Classes by number; and, where a row says the same twice, 0 or 1 for each."""
    named = tasks.get(listed(tmp_path / "a.jsonl", [[3], [10, 3], [], [7.0]] * 8))
    assert named.label_names == ("3", "7", "10") and contents(named)["t1"] == ["3", "10"]
    for number, rows in enumerate(([[0, 1, 0], [1, 1, 0]], [[0.0, 1.0], [0.0, 0.0]], [[True, False], [False, True]])):
        bits = tasks.get(listed(tmp_path / f"{number}.jsonl", rows * 8))
        assert bits.label_names == tuple(map(str, range(len(rows[0]))))
        assert contents(bits)["t1"] == [str(place) for place, bit in enumerate(rows[1]) if bit]
    pairs = tasks.get(listed(tmp_path / "p.jsonl", [[0, 1], [1], [0]] * 8))  # not all of one length: classes
    assert pairs.label_names == ("0", "1") and contents(pairs)["t1"] == ["1"]


def test_what_a_model_is_given(tmp_path, tokenizer):
    from transformers import BertConfig, BertForSequenceClassification

    task = tasks.get(listed(tmp_path / "a.jsonl"))
    kwargs = task.model_kwargs()
    assert (kwargs["num_labels"], kwargs["problem_type"]) == (3, "multi_label_classification")
    assert type(task.take(train=5)) is type(task) and len(task.take(train=5).splits["train"]) == 5
    encoded = task.encode(tokenizer)["train"]
    batch = task.collator(tokenizer)([encoded[n] for n in range(5)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (5, 3)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=len(tokenizer), **kwargs)).eval()
    out = model(**batch)
    p, y = torch.sigmoid(out.logits), batch["labels"]
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    torch.testing.assert_close(out.loss, by_hand, rtol=1e-5, atol=1e-6)


def test_metrics_by_hand(tmp_path):
    """Counts of each class: right 1, 1, 0; said 2, 1, 1; wanted 1, 2, 0."""
    logits = np.array([[2.0, -1.0, 3.0], [1.0, 0.5, -1.0], [-1.0, -0.1, -2.0]])
    labels = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    found = tasks.get(listed(tmp_path / "a.jsonl"), metric="exact_match").compute_metrics(
        EvalPrediction(logits, labels)
    )
    assert list(found) == ["exact_match", "micro_f1", "macro_f1"]
    assert found["exact_match"] == 0.0
    assert found["micro_f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert metrics.score_sets((labels * 2 - 1, "hidden states"), labels)["exact_match"] == 1.0
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (65, 5))
    assert metrics.score_sets(labels * 1.0, labels) == {"micro_f1": 1.0, "macro_f1": 1.0, "exact_match": 1.0}
    for bad, pattern in (
        ((np.full((65, 5), np.nan), labels), "must be finite"),
        ((np.ones((65, 4)), labels), r"both \[rows, classes\]"),
        ((np.ones((65, 5)), labels * 2), r"labels must be 0 or 1 \(got 2\)"),
    ):
        with pytest.raises(ValueError, match=pattern):
            metrics.score_sets(*bad)


def refused(path, pattern, error=tasks.DataError, **options):
    with pytest.raises(error, match=pattern) as caught:
        tasks.get(path, **options)
    assert "\n" not in str(caught.value)


def test_labels_that_are_no_sets(tmp_path):
    path = tmp_path / "a.jsonl"
    for value, pattern in (
        (None, "line 41: label 'label' is null; no class at all is"),
        ("sport", r"line 41: label 'label' must be a list of classes \(got 'sport'\); label_separator"),
        ([["sport"]], r"line 41: label 'label' must be a string or an integer \(got list\)"),
        ([0.5], r"line 41: label 'label' must be a class, not a fraction \(got 0.5\)"),
        ([" "], "line 41: label 'label' is blank"),
    ):
        refused(listed(path, [*SETS, value]), pattern)
    refused(listed(path, [[], []] * 9), r"a\.jsonl: label 'label' needs 2 classes or more \(got none\)")
    refused(listed(path, [["x"], []] * 9), r"needs 2 classes or more \(got only 'x'\)")
    listed(path)
    refused(path, "line 2: label 'war' of the test file is unknown; training has 'economy'",
            test=listed(tmp_path / "t.jsonl", [["sport"], ["war"]]))  # fmt: skip
    refused(path, r"t\.jsonl: no scored row \(2\) has a class", test=listed(tmp_path / "t.jsonl", [[], []]))
    bits = listed(tmp_path / "bits.jsonl", [[0, 1, 1], [0, 0, 0]] * 9)
    for value in ([0, 1], [0, 1, 2], [0, 1, "x"]):
        refused(bits, r"t\.jsonl line 1: label 'label' must be a list of 3, each 0 or 1",
                test=listed(tmp_path / "t.jsonl", [value]))  # fmt: skip
    refused(path, "label 'label' must be a string or an integer", task_type="classification")
    refused(path, "of a regression must be a number", task_type="regression")


def test_texts_with_separators(tmp_path):
    rows = [("x", "a|b"), ("y", "a"), ("z", "")] * 9
    path = table(tmp_path / "a.csv", ("text", "label"), rows)
    refused(path, r"line 2: label 'label' must be a list of classes \(got 'a\|b'\); label_sep", task_type="multi-label")
    refused(table(path, ("text", "label"), [("z", "")]), r"line 2: .*\(got null\); label_sep", task_type="multi-label")
    refused(table(tmp_path / "b.csv", ("text", "label"), [*rows, ("w", "a||b")]),
            r"line 29: label 'label': a class between separators '\|' is blank", label_separator="|")  # fmt: skip


def test_lists_that_are_texts(tmp_path):
    """As pandas writes a column of lists to CSV."""
    texts = [(f"t{n}", str(label)) for n, label in enumerate(SETS)]
    is_sets(tasks.get(table(tmp_path / "a.csv", ("text", "label"), texts), task_type="multi-label"))
    texts = [(text, json.dumps(label)) for (text, _), label in zip(texts, SETS, strict=True)]
    is_sets(tasks.get(table(tmp_path / "b.tsv", ("text", "label"), texts), task_type="multi-label"))
    for wrong in ("['a' 'b']", "['a', b]", "{'a': 1}", "[" * 999, "('a', 'b')", "3"):
        path = table(tmp_path / "c.csv", ("text", "label"), [*texts, ("t", wrong)])
        refused(path, "c.csv line 42: label 'label' must be a list of classes", task_type="multi-label")


def test_columns_of_bits(tmp_path):
    rows = [(f"t{n}", n % 2, "1.0") for n in range(20)]
    for value, got in (("2", "'2'"), ("", "null"), ("nan", "'nan'"), ("yes", "'yes'")):
        path = table(tmp_path / "a.csv", ("text", "x", "y"), [*rows, ("t", 0, value)])
        refused(path, rf"line 22: label 'y' must be 0 or 1 \(got {got}\)", label_columns=("x", "y"))
    refused(table(tmp_path / "a.csv", ("text", "x", "y"), rows), "column 'z' is missing", label_columns=("x", "z"))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"task_type": "multi_label"}, r"task_type must be one of classification, regression, multi-label, tokens"),
        ({"task_type": "multi-label", "regression": True}, "task_type must be 'regression' with regression True"),
        ({"task_type": "multi-label", "regression": False}, "task_type must be 'classification' with regression False"),
        ({"task_type": "regression", "label_separator": "|"}, "task_type must be 'multi-label' with label_separator"),
        ({"regression": True, "label_columns": ("x", "y")}, "task_type must be 'multi-label' with label_columns"),
        ({"label_columns": ("x",)}, r"label_columns must be two columns or more, without a label \(got \('x',\)\)"),
        ({"label_columns": "x,y"}, "label_columns must be two columns or more"),
        ({"label_columns": ("x", "y"), "label": "label"}, "with label 'label'"),
        ({"label_columns": ("x", "x")}, "text must be one or two columns, not the label's"),
        ({"label_columns": ("x", "y"), "label_separator": "|"}, "label_separator must be what stands between"),
        ({"label_separator": ""}, "label_separator must be what stands between"),
        ({"label": ("x", "y")}, r"label must be one column \(got \('x', 'y'\)\); label_columns"),
        ({"label": "x, y"}, r"label must be one column \(got 'x, y'\); label_columns"),
        ({"task_type": "multi-label", "metric": "accuracy"}, "metric of multi-label must be one of micro_f1, macro_f1"),
        ({"task_type": "classification", "metric": "micro_f1"}, "metric of a classification must be one of accuracy"),
        ({"metric": "f1"}, r"\(got 'f1'\), of a regression one of pearson.*, of multi-label one of micro_f1"),
        ({"task_type": "tokens"}, r"extension must, for tokens, be one of .*\.conll.* \(got '\.csv'\)"),
    ],
)
def test_options_that_contradict(tmp_path, options, pattern):
    path = table(tmp_path / "a.csv", ("text", "label", "x", "y"), [(f"t{n}", n % 2, n % 2, 1) for n in range(20)])
    refused(path, pattern, ValueError, **options)


def test_metrics_equal_the_definitions():
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 2, (129, 7)), rng.normal(size=(129, 7))
    said = logits > 0
    right, total = np.sum(said & (labels == 1), axis=0), said.sum(axis=0) + labels.sum(axis=0)
    found = metrics.score_sets(logits, labels)
    assert found["micro_f1"] == pytest.approx(2 * right.sum() / total.sum(), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(np.mean(2 * right / total), abs=1e-12)
    assert found["exact_match"] == pytest.approx(
        np.mean([np.array_equal(*row) for row in zip(said, labels, strict=True)]), abs=1e-12
    )
