"""All eight GLUE tasks, through the real `load_dataset`, on a local repository of the hub's layout."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import EvalPrediction

from prunekern import tasks

TEXT = {
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
}
NUM_LABELS = {name: 3 if name == "mnli" else 1 if name == "stsb" else 2 for name in TEXT}
METRIC = {name: {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy") for name in TEXT}


@pytest.mark.parametrize("name", TEXT)
def test_columns_labels_and_metric(name, glue_folder, glue_rows):
    task = tasks.get(name, source=glue_folder)
    validation = "validation_matched" if name == "mnli" else "validation"
    assert (task.text_columns, task.num_labels, task.metric) == (TEXT[name], NUM_LABELS[name], METRIC[name])
    assert set(task.splits) == {
        "train",
        "validation",
    }  # test labels are hidden: no split to score on by mistake
    assert task.score_split == "validation"
    for split, source in (("train", "train"), ("validation", validation)):
        got = task.splits[split]
        rows = zip(*(got[column] for column in task.text_columns), got[task.label_column], strict=True)
        expected = glue_rows[name][source]
        assert [row[:-1] for row in map(list, rows)] == [row[:-1] for row in expected]
        assert np.allclose(got[task.label_column], [row[-1] for row in expected], atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_encoded_and_scored(name, glue_folder, tokenizer):
    task = tasks.get(name, source=glue_folder)
    encoded = task.encode(tokenizer, max_length=32)["validation"]
    raw = task.splits["validation"]
    for index in range(len(raw)):
        texts = [raw[index][column] for column in task.text_columns]
        assert encoded[index]["input_ids"] == tokenizer(*texts)["input_ids"]
        assert encoded[index]["input_ids"].count(tokenizer.sep_token_id) == len(texts)
    labels = np.asarray(encoded["labels"])
    perfect = labels[:, None] if name == "stsb" else np.eye(task.num_labels)[labels]
    assert task.compute_metrics(EvalPrediction(perfect, labels)) == {METRIC[name]: pytest.approx(1.0)}
    reverse = -perfect if name == "stsb" else np.roll(perfect, 1, axis=1)
    worst = {"accuracy": 0.0, "matthews": -1.0, "pearson": -1.0}[METRIC[name]]
    assert task.compute_metrics(EvalPrediction(reverse, labels)) == {METRIC[name]: pytest.approx(worst)}


def test_the_hub_repository_is_asked_for(glue_folder, monkeypatch):
    import datasets

    asked, real = [], datasets.load_dataset

    def redirected(source, *args, **kwargs):
        asked.append((source, *args))
        return real(str(glue_folder), *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", redirected)
    assert tasks.get("SST-2").num_labels == 2
    assert tasks.get("sts-b").label_names is None
    assert asked == [("nyu-mll/glue", "sst2"), ("nyu-mll/glue", "stsb")]


def test_without_the_hub_the_error_says_what_to_do():
    code = "from prunekern import tasks\ntry: tasks.get('sst2')\nexcept tasks.DataError as e: print(e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": os.devnull + "/none"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GLUE task 'sst2' could not be loaded from 'nyu-mll/glue' (")
    assert "pass source=FOLDER" in done.stdout and done.stdout.count("\n") == 1


def test_a_local_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source of GLUE task 'rte': there is no folder .*nowhere"):
        tasks.get("rte", source=tmp_path / "nowhere")


def test_a_folder_without_the_task(tmp_path, glue_rows, write_glue):
    folder = write_glue(tmp_path / "glue", {"sst2": glue_rows["sst2"]})
    with pytest.raises(tasks.DataError, match="GLUE task 'rte' could not be loaded"):
        tasks.get("rte", source=folder)


@pytest.mark.parametrize(
    "name, bad, message", [("sst2", -1, "0..1"), ("stsb", -1.0, "0..5"), ("stsb", float("nan"), "0..5")]
)
def test_a_hidden_label_is_refused(tmp_path, glue_rows, name, bad, message, write_glue):
    rows = copy.deepcopy(glue_rows[name])
    rows["validation"][1][-1] = bad
    folder = write_glue(tmp_path / "glue", {name: rows})
    with pytest.raises(tasks.DataError, match=rf"split 'validation', row 2: label must be in {message} \(got (-1|nan)"):
        tasks.get(name, source=folder)


def test_a_missing_column_names_those_there_are(tmp_path, glue_rows, write_glue):
    folder = write_glue(tmp_path / "glue", {"qnli": glue_rows["qnli"]})
    readme = folder / "README.md"
    readme.write_text("---\nconfigs:\n- config_name: rte\n  data_files:\n" + _files("qnli") + "---\n")
    with pytest.raises(
        tasks.DataError, match="column 'sentence1' is missing; there are question, sentence, label, idx"
    ):
        tasks.get("rte", source=folder)


def test_other_label_names_are_refused(tmp_path, glue_rows, write_glue):
    folder = write_glue(tmp_path / "glue", {"mrpc": glue_rows["mrpc"]})
    readme = folder / "README.md"
    readme.write_text("---\nconfigs:\n- config_name: rte\n  data_files:\n" + _files("mrpc") + "---\n")
    with pytest.raises(tasks.DataError, match="labels are not_equivalent, equivalent; expected entailment, not_ent"):
        tasks.get("rte", source=folder)


def test_an_empty_split_is_refused(tmp_path, glue_rows, write_glue):
    folder = write_glue(tmp_path / "glue", {"cola": glue_rows["cola"] | {"validation": []}})
    with pytest.raises(tasks.DataError, match="GLUE task 'cola'.*(no rows|could not be loaded)"):
        tasks.get("cola", source=folder)


def _files(task: str) -> str:
    return "".join(f"  - split: {split}\n    path: {task}/{split}-*\n" for split in ("train", "validation"))
