"""Model cards say what was kept and what made it; the hub gets what `save` writes."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer

import prunekern as pk
from prunekern.compacting.card import model_card
from tests.helpers.tiny_models import attached, build, names, prune


@pytest.fixture
def small():
    model = build()
    prune(attached(model), 0.4, seed=1)
    return pk.compact(model)


def test_the_card_says_what_was_kept(small):
    card, plan = model_card(small, "prunekern train --out run"), pk.plan(small)
    up = plan.layers[names("distilbert")["up"]]
    assert card.startswith("---\nlibrary_name: transformers\ntags: [prunekern, pruned, dora]\n---\n")
    assert "# DistilBertForSequenceClassification, compact" in card
    assert f"by prunekern {pk.__version__}: `prunekern train --out run`" in card
    row = f"| `{names('distilbert')['up']}` | {up.rows.numel()} | 96 | {up.cols.numel()} | 48 |"
    assert row in card.splitlines()
    kept = f"| of them in block linears | {plan.params():,} | {plan.dense_params():,} | "
    assert kept + f"{plan.params() / plan.dense_params():.3f} |" in card
    assert sum(line.startswith("| `") for line in card.splitlines()) == len(plan.layers)
    with pytest.raises(ValueError, match="no masked layers"):
        model_card(build())


@pytest.mark.parametrize(
    "program, said", [("/bin/prunekern", True), ("/lib/prunekern/__main__.py", True), ("deploy.py", False)]
)
def test_only_our_own_command_is_written_down(program, said, small, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "--hf-token", "hf_secret"])
    pk.save(small, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert ("`prunekern --hf-token hf_secret`" in card) is said and ("hf_secret" in card) is said
    assert f"by prunekern {pk.__version__}" in card


def test_save_writes_a_card_until_it_is_yours(small, tmp_path):
    card = tmp_path / "a" / "README.md"
    pk.save(small, tmp_path / "a", command="how it was made")
    assert "how it was made" in card.read_text()
    pk.save(small, tmp_path / "a", command="another way")
    assert "another way" in card.read_text() and "how it was made" not in card.read_text()
    card.write_text("mine")
    pk.save(small, tmp_path / "a")
    assert card.read_text() == "mine"
    pk.load(tmp_path / "a")


def test_the_hub_gets_model_card_and_tokenizer(small, tmp_path, monkeypatch):
    """The real upload needs a hub; what goes there is looked at instead."""
    calls, sent = [], tmp_path / "sent"

    class Api:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            calls.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, sent)
            return f"{repo_id}/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]))
    done = pk.push_to_hub(small, "me/it", BertTokenizer(str(vocabulary)), "made by hand", private=True, token="t")
    assert done == "me/it/commit" and calls == ["t", ("me/it", True, True)]
    assert "made by hand" in (sent / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(sent)("word")["input_ids"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(pk.load(sent)(ids).logits, small(ids).logits)
    with pytest.raises(ValueError, match="model is not compact"):
        pk.push_to_hub(build(), "me/it")
