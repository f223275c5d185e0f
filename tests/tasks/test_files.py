"""Local files as tasks: the formats agree, splits are deterministic, bad data is named by file and line."""

import csv
import json

import numpy as np
import pytest
from transformers import EvalPrediction

from prunekern import tasks

ROWS = [
    {"id": n, "body": f'text "{n}", first\nsecond line é', "topic": ["tea", "sea", "bee"][n % 3]} for n in range(57)
]


def write(path, rows):
    if path.suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def contents(task):
    columns = [*task.text_columns, task.label_column]
    return {split: list(zip(*(data[column] for column in columns), strict=True)) for split, data in task.splits.items()}


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path, extension):
    task = tasks.get(write(tmp_path / f"train{extension}", ROWS), text="body", label="topic")
    other = tasks.get(write(tmp_path / "other.jsonl", ROWS), text="body", label="topic")
    assert (task.name, task.label_names, task.metric) == (f"train{extension}", ("bee", "sea", "tea"), "accuracy")
    assert contents(task) == contents(other)
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 45, "validation": 6, "test": 6}
    everything = sorted(row for rows in contents(task).values() for row in rows)
    assert everything == sorted((row["body"], task.label_names.index(row["topic"])) for row in ROWS)
    assert task.score_split == "test"


@pytest.mark.parametrize("form", ["list", "indented", "lines", "marked"])
def test_json_is_a_list_or_lines(tmp_path, form):
    path = write(tmp_path / "a.jsonl", ROWS).rename(tmp_path / "a.json")
    if form != "lines":
        path.write_text("\n " * (form == "indented") + json.dumps(ROWS, indent=2 if form == "indented" else None))
    if form == "marked":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    task = tasks.get(path, text="body", label="topic")
    assert contents(task) == contents(tasks.get(write(tmp_path / "b.jsonl", ROWS), text="body", label="topic"))


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_texts_of_any_length(tmp_path, extension):
    long = "long " * 40_000
    rows = [{"text": f"{long}{n}", "label": "ab"[n % 2]} for n in range(20)]
    task = tasks.get(write(tmp_path / f"train{extension}", rows), text="text", label="label")
    assert {len(text) for text in task.splits["train"]["text"]} <= {200_001, 200_002}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path / "excel.csv", [{"text": f"t{n}", "label": n % 2} for n in range(20)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tasks.get(path).label_names == ("0", "1")


def test_split_does_not_depend_on_the_order_of_the_rows(tmp_path):
    task = tasks.get(write(tmp_path / "a.jsonl", ROWS), text="body", label="topic")
    turned = tasks.get(write(tmp_path / "b.jsonl", ROWS[::-1]), text="body", label="topic")
    assert contents(task) == contents(turned)


def test_duplicates_do_not_straddle_splits(tmp_path):
    rows = [{"text": form, "label": n % 2} for n in range(40) for form in (f"Word {n}!", f"word  {n}", f"WORD {n}...")]
    splits = contents(tasks.get(write(tmp_path / "a.jsonl", rows), validation_share=0.25, test_share=0.25))
    seen = {split: {int(text.rstrip("!.").split()[1]) for text, _ in rows} for split, rows in splits.items()}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 60, "validation": 30, "test": 30}
    assert sum(map(len, seen.values())) == 40  # every number in exactly one split


def test_files_of_their_own(tmp_path):
    train = write(tmp_path / "train.csv", ROWS)
    validation = write(tmp_path / "valid.jsonl", ROWS[:5])
    test = write(tmp_path / "test.parquet", ROWS[5:9])
    task = tasks.get(train, text="body", label="topic", validation=validation, test=test)
    assert sorted(row[0] for row in contents(task)["train"]) == sorted(row["body"] for row in ROWS)
    assert len(task.splits["train"]) == len(ROWS)
    assert [row[0] for row in contents(task)["validation"]] == [row["body"] for row in ROWS[:5]]
    assert [row[0] for row in contents(task)["test"]] == [row["body"] for row in ROWS[5:9]]
    only_validation = tasks.get(train, text="body", label="topic", validation=validation, test_share=0)
    assert set(only_validation.splits) == {"train", "validation"} and only_validation.score_split == "validation"


def test_two_text_columns(tmp_path, tokenizer):
    rows = [{"q": f"a dog {n}", "a": "the cat .", "label": n % 2} for n in range(20)]
    task = tasks.get(write(tmp_path / "a.csv", rows), text=["q", "a"])
    row = task.encode(tokenizer)["train"][0]
    assert row["input_ids"] == tokenizer(task.splits["train"]["q"][0], "the cat .")["input_ids"]
    assert 1 in row["token_type_ids"]


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
def test_integer_labels_are_numbered_by_value(tmp_path, extension):
    rows = [{"text": f"t{n}", "label": [10, -1, 2][n % 3]} for n in range(30)]
    task = tasks.get(write(tmp_path / f"a{extension}", rows), test_share=0)
    assert task.label_names == ("-1", "2", "10")
    expected = {row["text"]: task.label_names.index(str(row["label"])) for row in rows}
    assert all(expected[text] == label for rows in contents(task).values() for text, label in rows)


def test_integers_of_one_file_are_strings_and_floats_of_another(tmp_path):
    train = write(tmp_path / "train.parquet", [{"text": f"t{n}", "label": n % 2} for n in range(20)])
    validation = write(tmp_path / "valid.csv", [{"text": "x", "label": 1}])
    test = write(tmp_path / "test.jsonl", [{"text": "y", "label": 0.0}])
    task = tasks.get(train, validation=validation, test=test)
    assert (task.splits["validation"]["label"][:], task.splits["test"]["label"][:]) == ([1], [0])


def test_boolean_labels(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2 == 0} for n in range(20)]
    assert tasks.get(write(tmp_path / "a.jsonl", rows)).label_names == ("False", "True")


def test_a_class_drawn_away_whole_is_still_a_class(tmp_path):
    rows = [{"text": f"t{n}", "label": "common"} for n in range(40)] + [{"text": "once", "label": "rare"}]
    for share in (0.1, 0.3, 0.45):  # wherever the one row lands
        task = tasks.get(write(tmp_path / "a.jsonl", rows), validation_share=share, test_share=share)
        assert task.label_names == ("common", "rare")


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
def test_regression(tmp_path, tokenizer, extension):
    rows = [{"text": f"t{n}", "label": n / 4} for n in range(30)]
    task = tasks.get(write(tmp_path / f"a{extension}", rows), regression=True)
    assert (task.label_names, task.num_labels, task.metric) == (None, 1, "pearson")
    encoded = task.encode(tokenizer)["train"]
    batch = task.collator(tokenizer)([encoded[0], encoded[1]])
    assert str(batch["labels"].dtype) == "torch.float32" and batch["labels"].tolist() == encoded["labels"][:2]
    labels = np.asarray(encoded["labels"])
    assert task.compute_metrics(EvalPrediction(3 * labels[:, None] - 1, labels)) == {"pearson": pytest.approx(1.0)}


def test_metric_by_name(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(20)]
    task = tasks.get(write(tmp_path / "a.jsonl", rows), metric="matthews")
    prediction = EvalPrediction(np.eye(2)[[0, 0, 0, 1]], np.array([0, 0, 1, 1]))
    assert task.compute_metrics(prediction) == {"matthews": pytest.approx(1 / 3**0.5)}


# Bad input. Each message names the file, and the line or row where there is one.

GOOD = [{"text": f"t{n}", "label": n % 2} for n in range(20)]


def refused(path, pattern, error=tasks.DataError, **options):
    with pytest.raises(error, match=pattern) as caught:
        tasks.get(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_missing_column(tmp_path, extension):
    path = write(tmp_path / f"a{extension}", GOOD)
    refused(path, rf"a{extension}: column 'sentence' is missing; there are text, label", text="sentence")
    refused(path, rf"a{extension}: column 'topic' is missing; there are text, label", label="topic")


def test_a_json_line_without_the_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"label": 1, "body": "x"}])
    refused(path, r"a\.jsonl line 21: column 'text' is missing; there are label, body")


@pytest.mark.parametrize("extension", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_empty_file(tmp_path, extension):
    path = tmp_path / f"a{extension}"
    path.touch()
    refused(path, rf"data file .*a{extension} is empty")


@pytest.mark.parametrize(
    "name, content", [("a.csv", "text,label\n"), ("a.csv", "text,label\n\n"), ("a.jsonl", "\n \n")]
)
def test_no_rows(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, rf"data file .*{name} has no rows")


def test_no_rows_in_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema({"text": pyarrow.string(), "label": pyarrow.int64()})
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"data file .*a\.parquet has no rows")


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("extension, place", [(".csv", "line 3"), (".jsonl", "line 2"), (".parquet", "row 2")])
def test_unknown_label(tmp_path, split, extension, place):
    train = write(tmp_path / "train.csv", GOOD)
    other = write(tmp_path / f"other{extension}", [GOOD[0], {"text": "x", "label": 7}])
    refused(
        train,
        rf"other{extension} {place}: label '7' of the {split} file is unknown; training has '0', '1'$",
        **{split: other},
    )


def test_unknown_task():
    message = refused("sts2", "unknown task 'sts2': known are", ValueError)
    for known in (
        "reviews",
        "mrpc",
        "rte",
        "sst2",
        "mnli",
        "cola",
        "qnli",
        "qqp",
        "stsb",
        ".csv",
        ".jsonl",
        ".parquet",
    ):
        assert known in message


def test_unsupported_extension(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    refused(
        tmp_path / "a.xlsx",
        r"extension must be one of \.csv, \.tsv, \.jsonl, \.json, \.parquet \(got '\.xlsx'\)",
        ValueError,
    )
    refused(tmp_path, r"extension must be one of", ValueError)


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "no.csv", r"data file .*no\.csv does not exist", FileNotFoundError)
    (tmp_path / "folder.csv").mkdir()
    refused(tmp_path / "folder.csv", r"folder\.csv is a folder", FileNotFoundError)


@pytest.mark.parametrize("extension, place", [(".csv", "line 22"), (".jsonl", "line 21"), (".parquet", "row 21")])
@pytest.mark.parametrize("value, what", [(None, "is null"), ("  ", "is blank")])
def test_null_and_blank_text(tmp_path, extension, place, value, what):
    path = write(tmp_path / f"a{extension}", [*GOOD, {"text": value, "label": 1}])
    refused(path, rf"a{extension} {place}: text 'text' {what}")


@pytest.mark.parametrize("extension, place", [(".csv", "line 22"), (".jsonl", "line 21"), (".parquet", "row 21")])
def test_null_label(tmp_path, extension, place):
    path = write(tmp_path / f"a{extension}", [*GOOD, {"text": "x", "label": None}])
    refused(path, rf"a{extension} {place}: label 'label' is null")


def test_a_null_that_turned_integers_into_floats(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"text": "x", "label": float("nan")}])
    refused(path, r"a\.jsonl line 21: label 'label' is null")


@pytest.mark.parametrize("value", [3, ["a"], True])
def test_text_that_is_no_string(tmp_path, value):
    kind = type(value).__name__
    path = write(tmp_path / "a.jsonl", [*GOOD, {"text": value, "label": 1}])
    refused(path, rf"line 21: text 'text' must be a string \(got {kind}\)")


def test_half_an_emoji(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"text": "cut \ud83d", "label": 1}])
    refused(path, r"line 21: text 'text' holds half a character")


@pytest.mark.parametrize("label, got", [("good", "'good'"), (True, "True"), ([1], r"\[1\]")])
def test_a_label_that_is_no_number(tmp_path, label, got):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"text": "x", "label": label}])
    refused(path, rf"line 21: label 'label' of a regression must be a number \(got {got}\)", regression=True)


@pytest.mark.parametrize("label", ["inf", "nan", "-Infinity"])
def test_a_label_that_is_not_finite(tmp_path, label):
    path = write(tmp_path / "a.csv", [*GOOD, {"text": "x", "label": label}])
    refused(path, "line 22: label 'label' of a regression must be finite", regression=True)


def test_a_fraction_is_no_class(tmp_path):
    path = write(tmp_path / "a.jsonl", [*GOOD, {"text": "x", "label": 0.5}])
    refused(path, r"line 21: label 'label' must be a class.*\(got 0\.5\)", regression=False)
    path = write(tmp_path / "b.jsonl", [*GOOD, {"text": "x", "label": {"a": 1}}])
    refused(path, r"line 21: label 'label' must be a string or an integer \(got dict\)")


def test_one_class_is_too_few(tmp_path):
    path = write(tmp_path / "a.csv", [{"text": f"t{n}", "label": "yes"} for n in range(20)])
    refused(path, r"a\.csv: label 'label' needs 2 classes or more \(got only 'yes'\)")


def test_too_few_texts_to_split(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "same", "label": n % 2} for n in range(20)])
    refused(path, r"20 rows \(1 distinct texts\) are too few to draw test and validation from")
    path = write(tmp_path / "b.jsonl", GOOD[:2])
    refused(path, r"2 rows \(2 distinct texts\) are too few to draw test and validation from: train came out empty")


@pytest.mark.parametrize(
    "name, content, pattern",
    [
        ("a.csv", "text,label\nx,1\ny,2,3\n", r"line 3: 3 fields, but the header names 2"),
        ("a.csv", 'text,label\n"two\nlines",1\n\nx\n', r"line 5: 1 fields, but the header names 2"),
        ("a.csv", 'text,label\n"x"y,1\n', r"line 2: not valid CSV"),
        ("a.csv", "text,text,label\nx,y,1\n", r"column 'text' is there 2 times"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', r"line 2: not JSON"),
        ("a.jsonl", '[{"text": "x", "label": 1}]\n', r"line 1: expected a JSON object, got list"),
        ("a.json", '[{"text": "x", "label": 1}, 3]\n', r"a\.json row 2: expected a JSON object, got int"),
        ("a.json", '[{"text": "x", "label": 1}, {"text": "y"}]\n', r"a\.json row 2: column 'label' is missing"),
        ("a.json", '[{"text": "x", "label": 1},\n', r"a\.json: not JSON .*expected a list of objects"),
        ("a.json", '[{"text": "x", "text": "y"}]\n', r"a\.json: not JSON \(the name 'text' is there twice\)"),
        ("a.json", "[]\n", r"a\.json has no rows"),
        ("a.json", '{"text": "x", "label": 1}\n{"text"', r"a\.json line 2: not JSON"),
    ],
)
def test_malformed_lines(tmp_path, name, content, pattern):
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, pattern)


@pytest.mark.parametrize("extension, place", [(".csv", "line 22"), (".jsonl", "line 21"), (".json", "line 21")])
def test_other_encodings(tmp_path, extension, place):
    path = write(tmp_path / f"a{extension}", [*GOOD, {"text": "cafe", "label": 1}])
    path.write_bytes(path.read_bytes().replace(b"cafe", b"caf\xe9"))
    refused(path, rf"a{extension} {place}.*: not UTF-8")


def test_not_a_parquet_file(tmp_path):
    path = write(tmp_path / "a.parquet", GOOD)
    whole = path.read_bytes()
    for content in (b"text,label\nx,1\n", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(path, r"data file .*a\.parquet cannot be read as parquet")


@pytest.mark.parametrize(
    "options, pattern",
    [
        ({"text": ["a", "b", "c"]}, "text must be one or two columns"),
        ({"text": "label"}, "text must be one or two columns"),
        ({"metric": "f1"}, r"metric of a classification must be one of accuracy, matthews \(got 'f1'\)"),
        ({"metric": "accuracy", "regression": True}, "metric of a regression must be one of pearson"),
        ({"validation_share": 0}, r"validation_share must be between 0 and 1 \(got 0\)"),
        ({"test_share": 0.95}, r"test_share must be in \[0, 1 - validation_share\) \(got 0.95\)"),
        ({"columns": "x"}, "takes no option 'columns': accepted are text, label, validation, test, regression"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, pattern):
    refused(write(tmp_path / "a.csv", GOOD), pattern, ValueError, **options)


def test_an_option_that_is_none_counts_as_not_given(tmp_path):
    path = write(tmp_path / "a.csv", GOOD)
    assert contents(tasks.get(path, text=None, validation=None, metric=None)) == contents(tasks.get(path))
    refused("sst2", "task 'sst2' takes no option 'text': accepted are source", ValueError, text="x")
    refused("reviews", "task 'reviews' takes no option 'text': accepted are none", ValueError, text="x")
