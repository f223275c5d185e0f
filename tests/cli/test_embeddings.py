"""`prunekern train --task embeddings`, all the way: masked, compact, trained in all that is kept, in int8, resumed."""

import json
import shutil
import sys

import numpy as np
import pytest

import prunekern as pk
from prunekern import cli
from tests.helpers.tiny_sentences import sentence_model, texts


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


def test_embeddings(run, tmp_path):
    sentence_model(tmp_path / "dense").save(str(tmp_path / "model"))
    some = list(dict.fromkeys(" ".join(texts()[i].split()[: 2 + i % 7] + ["end"] * (i % 5)) for i in range(24)))
    some += [f"{text} {other}" for text in some[:10] for other in some[10:16]]
    (tmp_path / "texts.txt").write_text("\n".join(some) + "\n")
    command = ("train", "--model", tmp_path / "model", "--task", "embeddings", "--data", tmp_path / "texts.txt")
    command += ("--out", tmp_path / "out", "--sparsity", 0.5, "--max-steps", 12, "--batch-size", 8, "--lr", 1e-2)
    command += ("--threads", 1, "--quantize", "int8", "--kept-steps", 60, "--kept-lr", 3e-3)
    status, shown, err = run(*command)
    assert status == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    scores = report["score"]
    before, after = scores["before all that is kept is trained"], scores["compact"]
    assert 1 - after["cosine"] < 0.7 * (1 - before["cosine"]) and abs(scores["int8"]["cosine"] - after["cosine"]) < 0.02
    assert report["kept"]["steps"] == 60 and "rank correlation" in shown
    small = pk.load(tmp_path / "out/compact")
    assert small.max_seq_length == 12 and pk.plan(small).sparsity() == pytest.approx(0.5, abs=0.03)
    pk.load_adapter(sentence_model(tmp_path / "again")[0].auto_model, tmp_path / "out/adapter")

    shutil.rmtree(tmp_path / "out/kept/checkpoints")  # stopped between both
    want = small.encode(some[:5])
    assert run(*command, "--resume")[0] == 0
    np.testing.assert_array_equal(pk.load(tmp_path / "out/compact").encode(some[:5]), want)


def test_what_is_refused(run, tmp_path):
    common = ("train", "--model", tmp_path, "--out", tmp_path / "out")
    for options, message in (
        (("--task", "reviews", "--kept-steps", 5), "--kept-steps must not be given without --task embeddings (got 5)"),
        (("--task", "embeddings", "--kept-steps", 0), "--kept-steps must be positive (got 0)"),
        (("--task", "embeddings", "--kept-lr", 1e-4), "--kept-lr must not be given without --kept-steps (got 0.0001)"),
    ):
        status, _, err = run(*common, *options)
        assert status != 0 and message in err
