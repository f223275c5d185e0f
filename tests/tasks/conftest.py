"""Local stand-ins for what lives on the hub: a GLUE repository and a small tokenizer."""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"


def _write_glue(folder: Path, rows: dict) -> Path:
    """A dataset repository of the hub's layout: README.md and <task>/<split>-00000-of-00001.parquet.

    rows: {task: {split: [[text, ..., label], ...]}}; columns and types are those the README declares.
    """
    import yaml
    from datasets import ClassLabel, Dataset, Features, Value

    page = yaml.safe_load((DATA / "glue" / "README.md").read_text().split("---")[1])
    # A repository declares only what it holds: `datasets` refuses a configuration without files.
    page = {key: [entry for entry in page[key] if entry["config_name"] in rows] for key in page}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\n" + yaml.safe_dump(page) + "---\n")
    for entry in page["dataset_info"]:
        types = {}
        for feature in entry["features"]:
            dtype = feature["dtype"]
            names = None if isinstance(dtype, str) else dtype["class_label"]["names"]
            types[feature["name"]] = ClassLabel(names=list(names.values())) if names else Value(dtype)
        for split, records in rows[entry["config_name"]].items():
            data = zip(*([*record, number] for number, record in enumerate(records)), strict=True)
            columns = dict(zip(types, map(list, data), strict=True)) if records else {name: [] for name in types}
            path = folder / entry["config_name"] / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_dict(columns, features=Features(types)).to_parquet(path)
    return folder


@pytest.fixture(scope="session")
def write_glue():
    return _write_glue


@pytest.fixture(scope="session")
def glue_rows():
    return json.loads((DATA / "glue" / "rows.json").read_text())


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory, glue_rows):
    return _write_glue(tmp_path_factory.mktemp("hub") / "glue", glue_rows)


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """What load_dataset prepares goes to the test's own folder, not to the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="session")
def tokenizer():
    """A real WordPiece tokenizer over a few words; every other word is [UNK]."""
    from transformers import BertTokenizer

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a an the film dog cat good bad is was and of in it ##s . ,".split()
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=512)
