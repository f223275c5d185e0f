"""The command line on a tiny model and local files: the whole way, and what a user gets wrong."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import prunekern as pk
from prunekern.cli import app, main
from prunekern.machine.bf16_trap import bf16_matmul_crashes
from prunekern.tasks.harness import evaluate_tasks
from tests.helpers.dense_folders import WORDS, dense_folder
from tests.helpers.tiny_decoders import build
from tests.helpers.tiny_models import attached, prune
from tests.helpers.tiny_tokenizer import word_tokenizer


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny dense model with its tokenizer, and a sentiment task that words decide."""
    folder = tmp_path_factory.mktemp("cli")
    dense_folder(folder / "dense")
    rows = []
    for i in range(240):
        word = WORDS[i % 8]
        sentence = f"the {WORDS[8 + i % 4]} was {'very ' if i % 3 else ''}{word}"
        rows.append({"text": sentence, "label": "positive" if i % 8 < 4 else "negative"})
    for name, part in (("train", rows[:160]), ("validation", rows[160:200]), ("test", rows[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder


def data(files):
    options = ["--data", files / "train.jsonl", "--validation", files / "validation.jsonl"]
    return [*options, "--test", files / "test.jsonl", "--text", "text", "--label", "label", "--max-length", 16]


def test_train_eval_bench(files, tmp_path):
    out = tmp_path / "run"
    common = ["--batch-size", 16, "--lr", 1e-2, "--final-lr", 3e-3, "--rank", 8, "--sparsity", 0.3, "--threads", 1]
    result = invoke("train", "--model", files / "dense", *data(files), "--out", out, "--max-steps", 120, *common)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert 0.3 <= report["trained"]["sparsity"] < 0.3 + 66 / 16832  # met from above, within the dearest group
    assert report["score"]["masked"] == report["score"]["compact"]
    assert report["score"]["compact"]["accuracy"] > 0.9  # a word decides: anything that learns gets this right
    assert {p.name for p in (out / "compact").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}

    scored = invoke("eval", out / "compact", *data(files))
    assert scored.exit_code == 0, scored.output
    assert f"{100 * report['score']['compact']['accuracy']:.2f}" in scored.output

    again = invoke("compact", files / "dense", out / "adapter", tmp_path / "streamed")
    assert again.exit_code == 0, again.output
    one, two = (pk.load(folder) for folder in (out / "compact", tmp_path / "streamed"))
    assert pk.plan(one) == pk.plan(two)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    same = invoke("eval", tmp_path / "streamed", *data(files))  # with the base's tokenizer
    assert same.output.splitlines()[-1] == scored.output.splitlines()[-1]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # transformers then makes an empty one
        (tmp_path / "streamed" / name).unlink()
    without = invoke("eval", tmp_path / "streamed", *data(files))
    assert isinstance(without.exception, FileNotFoundError) and "has no tokenizer" in str(without.exception)

    timed = invoke("bench", out / "compact", "--shapes", "1x8", "--seconds", 0.1, "--threads", 0)
    assert timed.exit_code == 0, timed.output
    assert "1 x 8" in timed.output
    long = invoke("bench", out / "compact", "--shapes", "1x99999", "--seconds", 0.1)
    assert isinstance(long.exception, ValueError) and "tokens must be at most" in str(long.exception)

    rows = [json.loads(line) for line in (files / "test.jsonl").read_text().splitlines()]
    assert f"test ({len(rows)})" in scored.output and "warning" not in scored.output
    names = sorted({row["label"] for row in rows})
    for split in ("train", "validation", "test"):
        text = (files / f"{split}.jsonl").read_text()
        (tmp_path / f"{split}.jsonl").write_text(text.replace(f'"{names[0]}"', '"a"').replace(f'"{names[1]}"', '"b"'))
    renamed = invoke("eval", out / "compact", *data(tmp_path))
    assert renamed.exit_code == 0, renamed.output
    assert "labels are compared by number" in renamed.output
    config = json.loads((out / "compact" / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(reversed(names))}
    (out / "compact" / "config.json").write_text(json.dumps(config))
    swapped = invoke("eval", out / "compact", *data(files))
    assert isinstance(swapped.exception, ValueError) and f"has the labels {names[::-1]}" in str(swapped.exception)


@pytest.mark.skipif(bf16_matmul_crashes(), reason="needs a CPU whose AMX oneDNN can use, or none")
def test_train_under_bf16_autocast(files, tmp_path, monkeypatch):
    found = set()
    real = pk.nn.MaskedDoRALinear.forward

    def forward(layer, x):
        y = real(layer, x)
        found.add((layer.training, torch.is_autocast_enabled("cpu"), y.dtype, layer.A.dtype))
        return y

    monkeypatch.setattr(pk.nn.MaskedDoRALinear, "forward", forward)
    out, common = tmp_path / "run", ["--batch-size", 16, "--lr", 1e-2, "--sparsity", 0.3, "--threads", 1]
    args = ["train", "--model", files / "dense", *data(files), "--out", out, "--max-steps", 120, *common, "--bf16"]
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert found == {(True, True, torch.bfloat16, torch.float32), (False, False, torch.float32, torch.float32)}
    report = json.loads((out / "report.json").read_text())
    assert report["options"]["bf16"] is True
    assert json.loads((out / "checkpoints" / "run.json").read_text())["bf16"] is True
    assert report["score"]["masked"] == report["score"]["compact"]
    assert report["score"]["compact"]["accuracy"] > 0.9
    assert {p.dtype for p in pk.load(out / "compact").parameters()} == {torch.float32}
    again = invoke(*args[:-1], "--resume")
    assert isinstance(again.exception, ValueError) and "the run began with bf16 True" in str(again.exception)


def test_train_quantize(files, tmp_path):
    """The choice is in OUT/compact beside fp32 weights, and what eval says of it is what train said."""
    options = ["--batch-size", 16, "--lr", 1e-2, "--sparsity", 0.3, "--threads", 1, "--max-steps", 20]
    plain, out = tmp_path / "plain", tmp_path / "run"
    trained = invoke("train", "--model", files / "dense", *data(files), "--out", plain, *options)
    result = invoke("train", "--model", files / "dense", *data(files), "--out", out, *options, "--quantize", "int8")
    assert trained.exit_code == result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    calibrated = report["calibrated"]
    assert (calibrated["weights"], calibrated["held"]) == ("int8", {}) and 30 < calibrated["least_db"] < 60
    section = json.loads((out / "compact" / "config.json").read_text())["quantization_config"]
    assert section["held"]["weights"] == "int8" and section["format"] == 2
    assert "0 of 12 layers are held in more bits than int8" in result.output
    for a, b in zip(*(pk.load(folder / "compact").parameters() for folder in (plain, out)), strict=True):
        assert torch.equal(a, b)
    accuracy = f"{100 * report['score']['int8']['accuracy']:.2f}"
    assert f"{accuracy} in int8" in " ".join(result.output.split())
    scored = invoke("eval", out / "compact", *data(files), "--weights", "int8", "--activations", "auto")
    assert scored.exit_code == 0 and f"accuracy {accuracy}" in scored.output
    timed = invoke("bench", out / "compact", "--shapes", "1x8", "--seconds", 0.1, "--weights", "int8",
                   "--activations", "float")  # fmt: skip
    assert timed.exit_code == 0, timed.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--quantize", "int3"], "--quantize must be one of int8"),
        (["--sparsity", "1.0"], "sparsity must be in"),
        (["--rank", "0"], "rank must be"),
        (["--preset", "paper", "--sparsity", "0.6"], "the most it can remove is"),
        (["--preset", "none"], "preset must be one of"),
        (["--text", "sentence"], "sentence"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--max-steps", "0"], "--max-steps must be positive"),
        (["--rule", "lerned"], "rule must be one of"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(files, tmp_path, change, message, capsys, monkeypatch):
    args = ["train", "--model", files / "dense", *data(files), "--out", tmp_path / "run", "--max-steps", 2]
    if change[0] in args:
        args[args.index(change[0]) + 1] = change[1]
    else:
        args += change
    monkeypatch.setattr(sys, "argv", ["prunekern", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert message in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "run" / "compact").exists()


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(files, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for args in (
        ["eval", tmp_path / "no", *data(files)],
        ["train", "--model", tmp_path / "no", *data(files), "--out", tmp_path / "run"],
        ["compact", tmp_path / "no", tmp_path / "adapter", tmp_path / "out"],
    ):
        result = invoke(*args)
        assert isinstance(result.exception, FileNotFoundError) and "no such folder" in str(result.exception)


@pytest.mark.parametrize("missing, extra", [("datasets", "hf"), ("matplotlib", "hf"), ("lm_eval", "eval")])
def test_a_missing_extra_is_named_before_anything_is_trained(missing, extra, files, decoder, tmp_path):
    train = ["train", "--model", files / "dense", *data(files), "--out", tmp_path / "run", "--max-steps", 2]
    scores = ["eval", decoder / "small", "--tasks", "piqa", "--local", decoder / "items"]
    code = f"import sys; sys.modules[{missing!r}] = None; from prunekern.cli import main; main()"
    args = map(str, scores if missing == "lm_eval" else train)
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 2 and f"prunekern[{extra}]" in result.stderr.splitlines()[-1], result.stderr
    assert not (tmp_path / "run").exists()


def test_task_or_data(files, tmp_path):
    neither = invoke("train", "--model", files / "dense", "--out", tmp_path)
    both = invoke("train", "--model", files / "dense", "--out", tmp_path, "--task", "sst2", *data(files))
    assert neither.exit_code == both.exit_code == 2
    assert "either --task or --data" in neither.output


def test_info_names_version_and_isa():
    result = invoke("info")
    assert result.exit_code == 0
    assert pk.__version__ in result.output
    assert torch.__version__ in result.output
    if pk._native.available():
        assert "GFLOP/s" in result.output and "GB/s" in result.output and "amx" in result.output


def test_bench_refuses_a_dense_folder(files):
    code = "from prunekern.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", str(files / "dense")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "not a compact model" in result.stderr


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny compact decoder with its tokenizer, and two of lm-eval's tasks as local files."""
    folder = tmp_path_factory.mktemp("decoder")
    masked = build(max_position_embeddings=64)
    prune(attached(masked), 0.3)
    pk.save(pk.compact(masked), folder / "small")
    word_tokenizer().save_pretrained(folder / "small")
    rows = {
        "piqa": [
            {"goal": "cat sat", "sol1": "on a mat", "sol2": "over hills and hills", "label": 0},
            {"goal": "birds sang", "sol1": "some dogs", "sol2": "songs of spring", "label": 1},
        ],
        "boolq": [{"question": "cat sat", "passage": "the cat sat on a mat", "idx": 0, "label": 1}],
    }
    for task, items in rows.items():
        (folder / "items" / task).mkdir(parents=True)
        text = "".join(json.dumps(item) + "\n" for item in items)
        (folder / "items" / task / "validation.jsonl").write_text(text)
    return folder


def test_eval_by_lm_eval(decoder, tmp_path):
    small, out = pk.load(decoder / "small", "bf16"), tmp_path / "scores.json"
    common = ["--local", decoder / "items", "--weights", "bf16", "--threads", 1]
    result = invoke("eval", decoder / "small", "--tasks", "piqa, boolq", *common, "--json", out)
    assert result.exit_code == 0, result.output
    want = evaluate_tasks(small, word_tokenizer(), ["piqa", "boolq"], decoder / "items")
    made_of = {"model": str(decoder / "small"), "weights": "bf16", "activations": "auto"}
    assert json.loads(out.read_text()) == made_of | want
    assert f"mean of those marked *: {100 * want['mean']:.2f}" in result.output
    assert f"{100 * want['tasks']['piqa']['acc']:.2f} ± " in result.output and "warning" not in result.output
    first = invoke("eval", decoder / "small", "--tasks", "piqa", *common, "--limit", 1, "--batch-size", 1)
    assert first.exit_code == 0 and "first 1 items" in first.output and "±" not in first.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "piqa", "--task", "science"], "--tasks without --task"),
        (["--tasks", "piqa", "--label", "x"], "--tasks without --task"),
        (["--task", "science", "--limit", "3"], "go with --tasks"),
        (["--tasks", "piqa", "--json", "nowhere/at/all.json"], "there is no folder"),
    ],
)
def test_options_of_eval_that_do_not_go_together(decoder, options, message):
    result = invoke("eval", decoder / "small", *options)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())


def test_eval_by_lm_eval_refuses_what_it_cannot_score(decoder, files):
    for model, options, message in (
        (decoder / "small", ["--tasks", "pica"], "no task 'pica'"),
        (decoder / "small", ["--tasks", "piqa", "--limit", 0], "limit must be"),
        (files / "dense", ["--tasks", "piqa"], "is a distilbert model, which has no head for predicting text"),
    ):
        result = invoke("eval", model, *options, "--local", decoder / "items")
        assert isinstance(result.exception, ValueError) and message in str(result.exception)
