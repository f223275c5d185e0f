"""What labels are: scores or classes, the same of every format; and what is neither is named by file and line."""

import json

import pytest

from prunekern import tasks
from prunekern.tasks.labels import Rows, is_regression

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def write(path, labels, texts=None):
    """labels as Python holds them; CSV and TSV get them as Python writes them."""
    rows = [(text, label) for text, label in zip(texts or [f"t{n}" for n in range(len(labels))], labels, strict=True)]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        between = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(f"{text}{between}{label}\n" for text, label in [("text", "label"), *rows]))
    return path


SCORES = [n / 5 for n in range(26)] * 2  # 0.0, 0.2, ..., 5.0, as STS-B has them


@pytest.mark.parametrize("extension", FORMATS)
def test_scores_are_a_regression(tmp_path, extension):
    """26 classes once, in a CSV. As run_glue of transformers: labels that are floats are a regression."""
    task = tasks.get(write(tmp_path / f"a{extension}", SCORES))
    assert (task.label_names, task.num_labels, task.metric) == (None, 1, "pearson")
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}
    found = sorted(label for data in task.splits.values() for label in data["label"])
    assert found == pytest.approx(sorted(SCORES), rel=1e-7)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("labels", [[0.0, 1.0] * 10, [0, 1] * 10, [1.0, 0.0, 2.0, 10.0] * 5])
def test_whole_numbers_are_classes_however_written(tmp_path, extension, labels):
    task = tasks.get(write(tmp_path / f"a{extension}", labels))
    assert task.label_names == tuple(str(n) for n in sorted({int(n) for n in labels})) and task.metric == "accuracy"
    scores = tasks.get(write(tmp_path / f"b{extension}", labels), regression=True, metric="mse")
    assert scores.label_names is None and scores.num_labels == 1


@pytest.mark.parametrize("train", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_files_of_two_formats_agree(tmp_path, train, other):
    floats = write(tmp_path / f"train{train}", [0.0, 1.0] * 10)
    integers = write(tmp_path / f"test{other}", [0, 1] * 3)
    task = tasks.get(floats, test=integers)
    assert task.label_names == ("0", "1") and task.splits["test"]["label"][:] == [0, 1] * 3
    scores = write(tmp_path / f"scores{train}", SCORES)
    assert tasks.get(scores, test=integers).splits["test"]["label"][:] == [0.0, 1.0] * 3


def test_a_metric_says_which(tmp_path):
    path = write(tmp_path / "a.csv", [1, 2, 3, 4] * 6)
    assert tasks.get(path, metric="spearman").label_names is None
    assert tasks.get(path, metric="accuracy").num_labels == 4
    assert tasks.get(path, regression=False).num_labels == 4


@pytest.mark.parametrize("extension", (".csv", ".tsv"))
def test_names_that_look_like_numbers(tmp_path, extension):
    path = write(tmp_path / f"a{extension}", ["3.8", "3.10", "3.0"] * 7)
    assert tasks.get(path, regression=False).label_names == ("3.0", "3.10", "3.8")
    path = write(tmp_path / f"b{extension}", ["01", "1", "2"] * 7)  # codes: whole ones stay as they are written
    assert tasks.get(path).label_names == ("01", "1", "2")
    path = write(tmp_path / "c.jsonl", ["3.8", "3.10"] * 7)  # a text in JSON is one
    assert tasks.get(path).label_names == ("3.10", "3.8")


@pytest.mark.parametrize(
    ("extension", "place"), [(".csv", "line 22"), (".tsv", "line 22"), (".jsonl", "line 21"), (".parquet", "row 21")]
)
def test_scores_and_texts_are_refused(tmp_path, extension, place):
    """One "n/a" among scores would make classes of them all."""
    if extension == ".parquet":  # one type a column: there it is a null, or all are texts
        with pytest.raises(tasks.DataError, match="row 21: label 'label' is null"):
            tasks.get(write(tmp_path / "a.parquet", [*SCORES[:20], None]))
        return
    path = write(tmp_path / f"a{extension}", [*SCORES[:20], "n/a"])
    pattern = (
        rf"a{extension} {place}: label 'label' must be a class or a number throughout \(got 'n/a', and .*--classes"
    )
    with pytest.raises(tasks.DataError, match=pattern):
        tasks.get(path)
    with pytest.raises(tasks.DataError, match=rf"{place}: label 'label' of a regression must be a number"):
        tasks.get(path, regression=True)


def test_text_labels_are_no_regression(tmp_path):
    path = write(tmp_path / "a.csv", ["good", "bad"] * 10)
    with pytest.raises(tasks.DataError, match=r"a\.csv line 2: .* of a regression must be a number \(got 'good'\)"):
        tasks.get(path, regression=True)


@pytest.mark.parametrize("label", ["1e39", "-1e39", "1e999", "1_0", 10**400])
def test_numbers_that_are_none_in_fp32(tmp_path, label):
    path = write(tmp_path / "a.csv" if isinstance(label, str) else tmp_path / "a.jsonl", [*SCORES[:20], label])
    with pytest.raises(
        tasks.DataError, match=r"line 2\d: label 'label' .*must be (finite|a number|a class or a number)"
    ):
        tasks.get(path)


def test_decimals_of_parquet(tmp_path):
    from decimal import Decimal

    scores = tasks.get(write(tmp_path / "a.parquet", [Decimal("0.5"), Decimal("1.0"), Decimal("2.5")] * 12))
    assert scores.num_labels == 1 and set(scores.splits["train"]["label"]) <= {0.5, 1.0, 2.5}
    assert tasks.get(write(tmp_path / "b.parquet", [Decimal("0"), Decimal("1")] * 9)).label_names == ("0", "1")


def test_scored_labels_that_are_all_the_same(tmp_path):
    """A correlation is undefined then: said before training, not after."""
    train, test = write(tmp_path / "a.csv", SCORES), write(tmp_path / "test.csv", [2.5] * 4)
    with pytest.raises(tasks.DataError, match=r"test\.csv: label 'label' is the same in every scored row \(4\)"):
        tasks.get(train, test=test)
    task = tasks.get(train, test=test, metric="mse")
    assert task.show(0.12345678) == "0.1235"


def test_the_rule_by_itself():
    def of(*labels, typed=False):
        return is_regression(Rows("a", typed, [f"line {n}" for n in range(len(labels))], [], list(labels)), "label")

    assert of("0.5", "1") and of("-.5", "2", " 3e0 ") and of(0.5, 1, typed=True)
    assert not of("1.0", "2") and not of("a", "1") and not of("0.5", "1", typed=True) and not of(1.0, 2, typed=True)
    assert not of(True, False, typed=True) and not of("inf", "nan")
