"""`prunekern store`: folders in few bits, which the other commands read as they are."""

import pytest
from typer.testing import CliRunner

import prunekern as pk
from prunekern.cli import app
from prunekern.compacting.checkpoint import weights_of
from tests.helpers.compact_folders import small_model
from tests.helpers.tiny_tokenizer import word_tokenizer


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_store(kind, tmp_path):
    pk.save(small_model(), tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    result = invoke("store", tmp_path / "m", tmp_path / "few", "--weights", kind)
    assert result.exit_code == 0, result.output
    assert f"of weights in {kind}" in " ".join(result.output.split())
    assert weights_of(pk.load(tmp_path / "few")) == kind and (tmp_path / "few" / "tokenizer.json").is_file()
    timed = invoke("bench", tmp_path / "few", "--shapes", "1x8", "--seconds", 0.1)
    assert timed.exit_code == 0 and f"{kind} weights" in " ".join(timed.output.split()), timed.output
    again = invoke("store", tmp_path / "few", tmp_path / "few", "--weights", "fp32")  # in its own place
    assert again.exit_code == 0, again.output
    assert weights_of(pk.load(tmp_path / "few")) == "fp32" and (tmp_path / "few" / "tokenizer.json").is_file()


def test_store_of_what_is_wrong(tmp_path):
    pk.save(small_model(), tmp_path / "m")
    for options in (["--weights", "int3"], [], ["--weights", "int8", "--nonsense"]):
        assert invoke("store", tmp_path / "m", tmp_path / "few", *options).exit_code != 0
    assert invoke("store", tmp_path / "nowhere", tmp_path / "few", "--weights", "int8").exit_code != 0
    assert not (tmp_path / "few").exists()
