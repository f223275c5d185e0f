"""Whatever a user can give: one line on stderr and status 2, never a traceback; and what is left as it was."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prunekern import cli
from tests.helpers.compact_folders import ROOT
from tests.helpers.dense_folders import WORDS, dense_folder
from tests.helpers.on_disk import content, edit_json

MAIN = "from prunekern.cli import main; main()"


def run(capsys, monkeypatch, *arguments):
    """(status, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["prunekern", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    return end.value.code or 0, shown.out, shown.err


@pytest.fixture
def refused(capsys, monkeypatch):
    def check(message, *arguments):
        status, _, err = run(capsys, monkeypatch, *arguments)
        # The bars of libraries that were imported before the command could tell them to be quiet come before.
        assert status == 2 and "Traceback" not in err, err
        assert err.count("error: ") == 1 and err.splitlines()[-1].startswith("error: "), err
        assert message in err.splitlines()[-1], err

    return check


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Dense folders whole and damaged, data, and what `train` made of scores."""
    folder = tmp_path_factory.mktemp("mistakes")
    dense = dense_folder(folder / "dense")
    dense_folder(folder / "three", labels=3)
    dense_folder(folder / "unlimited", model_max_length=int(1e30))
    for name, change in {
        "strdim": lambda c: c.update(dim="wide"),
        "negdim": lambda c: c.update(dim=-1),
        "zeroheads": lambda c: c.update(n_heads=0),
        "wider": lambda c: c.update(dim=48),
        "unknown": lambda c: c.update(model_type="nonsense"),
    }.items():
        shutil.copytree(dense, folder / name)
        edit_json(folder / name / "config.json", change)
    for name, file, text in (
        ("cut", "model.safetensors", (dense / "model.safetensors").read_bytes()[:999]),
        ("badtok", "tokenizer.json", b"{}"),
        ("badjson", "config.json", b"{"),
    ):
        shutil.copytree(dense, folder / name)
        (folder / name / file).write_bytes(text)
    sentences = [f"the {WORDS[8 + i % 4]} was {'very ' * (i % 7)}{WORDS[i % 8]}" for i in range(112)]
    for name, labels in (("classes", ["good", "bad"]), ("scores", [n / 5 for n in range(26)])):
        lines = [f"{sentence},{labels[i % len(labels)]}\n" for i, sentence in enumerate(sentences)]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(lines))
    (folder / "file").write_text("x")
    return folder


def train(files, out, *more, model="dense", data="classes.csv"):
    common = ["--max-steps", 2, "--max-length", 16, "--threads", 1, "--batch-size", 4]
    return ["train", "--model", files / model, "--data", files / data, "--out", out, *common, *more]


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-c", MAIN, *map(str, train(files, out, "--batch-size", 16, data="scores.csv"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "test pearson: " in done.stdout, done.stderr
    return out


def test_scores_go_all_the_way(files, trained, tmp_path, capsys, monkeypatch):
    report = json.loads((trained / "report.json").read_text())
    masked, compact = (report["score"][kind]["pearson"] for kind in ("masked", "compact"))
    assert masked == pytest.approx(compact, abs=1e-3)  # after two steps predictions are nearly equal: digits cancel
    config = json.loads((trained / "compact" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    assert run(capsys, monkeypatch, "compact", files / "dense", trained / "adapter", tmp_path / "again")[0] == 0
    for folder in (trained / "compact", tmp_path / "again"):
        status, out, _ = run(capsys, monkeypatch, "eval", folder, "--data", files / "scores.csv", "--max-length", 16)
        assert status == 0 and f"pearson {100 * report['score']['compact']['pearson']:.2f}" in out
    common = ["eval", trained / "compact", "--data", files / "scores.csv", "--max-length", 16]
    assert "mse " in run(capsys, monkeypatch, *common, "--metric", "mse")[1]
    status, _, err = run(capsys, monkeypatch, *common, "--classes")
    assert status == 2 and "has 1 labels, scores.csv has 26" in err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("strdim", "strdim: cannot be read"),
        ("negdim", "negdim: cannot be read"),
        ("zeroheads", "zeroheads: cannot be read"),
        ("wider", "has shape [32], where its config and classes.csv ask for [48]"),
        ("three", "tensor 'classifier.bias' has shape [3], where its config and classes.csv ask for [2]"),
        ("unknown", "model type `nonsense`"),
        ("cut", "cut: cannot be read (SafetensorError"),
        ("badtok", "badtok: cannot be read"),
        ("badjson", "is not a valid JSON file"),
        ("file", "no such folder"),
    ],
)
def test_models_that_are_damaged_or_do_not_fit(files, tmp_path, refused, model, message):
    refused(message, *train(files, tmp_path / "out", model=model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["strdim", "cut", "badjson", "unknown"])
def test_the_same_by_eval(files, refused, model):
    refused("", "eval", files / model, "--data", files / "classes.csv", "--max-length", 16)


def test_texts_longer_than_the_models_positions(files, trained, tmp_path, refused):
    """transformers' tokenizers often know no limit; the model then fails in the middle of training."""
    for length, message in ((33, "must be at most 32, its positions (got 33)"), (10**30, "positions"), (1, "in 3..")):
        refused(message, *train(files, tmp_path / "out", "--max-length", length, model="unlimited"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--final-lr", "-1"], "--final-lr must be positive"),
        (["--mask-lr", "nan"], "--mask-lr must be positive (got nan)"),
        (["--epochs", "inf", "--max-steps", "-1"], "--epochs must be positive (got inf)"),
        (["--batch-size", "0"], "--batch-size must be positive"),
        (["--save-steps", "0"], "--save-steps must be positive"),
        (["--threads", "1000000"], "--threads must be in 0.."),
        (["--sparsity", "x"], "'--sparsity'"),
        (["--nonsense"], "No such option: --nonsense"),
        (["--metric", "f1"], "metric of a classification must be one of"),
        (["--regression"], "of a regression must be a number (got 'good')"),
        (["--text", ""], "column '' is missing"),
        (["--seed", "-1"], "seed must be"),
        (["--lr", "nan"], "learning rate"),
    ],
)
def test_options_out_of_range(files, tmp_path, refused, options, message):
    refused(message, *train(files, tmp_path / "out", *options))


def test_bf16_on_a_cpu_where_it_crashes(files, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("prunekern.machine.bf16_trap.bf16_matmul_crashes", lambda: True)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    refused("error: --bf16: PyTorch's bf16 matrix product dies with", *train(files, tmp_path / "out", "--bf16"))
    assert not (tmp_path / "out").exists()


def test_out_cannot_be_written(files, trained, tmp_path, refused):
    for out in (files / "file", files / "file" / "sub", "/proc/nowhere"):
        refused("", *train(files, out))
        refused("", "compact", files / "dense", trained / "adapter", out)
    refused("no such folder", "export", trained / "compact", tmp_path / "no" / "x.onnx")
    refused("is a folder", "export", trained / "compact", tmp_path)
    os.mkfifo(tmp_path / "device")  # as /dev/full would be replaced by a file
    refused("no ordinary file", "export", trained / "compact", tmp_path / "device")
    for given in (files / "dense", trained / "adapter"):
        before = content(given)
        refused("is read from", "compact", files / "dense", trained / "adapter", given)
        assert content(given) == before


def test_commands_alone(capsys, monkeypatch, refused):
    status, out, err = run(capsys, monkeypatch)
    assert status == 2 and "Traceback" not in err and "train" in out + err
    refused("No such command 'nonsense'", "nonsense")
    refused("Missing option", "train")
    assert run(capsys, monkeypatch, "--help")[0] == run(capsys, monkeypatch, "train", "--help")[0] == 0


def test_what_nobody_thought_of_is_one_line_too(capsys, monkeypatch, refused, files):
    def odd(*args, **kwargs):
        raise KeyError("odd\nname")

    monkeypatch.setattr("prunekern.tasks.get", odd)
    command = ["eval", files / "three", "--data", files / "classes.csv"]
    refused("KeyError: 'odd\\nname' (prunekern --traceback COMMAND ... says where)", *command)
    monkeypatch.setattr(sys, "argv", ["prunekern", "--traceback", *map(str, command)])
    with pytest.raises(KeyError):
        cli.main()


# -- what the system says ------------------------------------------------------------------------------------------


def started(*arguments, code=MAIN, **options):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {ROOT!r})\n{code}", *map(str, arguments)]
    # A shell's background job ignores Ctrl-C, and its children with it.
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c, **options)


def _hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_full_disk(files, trained, tmp_path):
    """The system says no while the model is being written: the old folder is whole, nothing else is left."""
    out = tmp_path / "out"
    shutil.copytree(trained / "compact", out)
    before = content(out)
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += f"resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000)); {MAIN}"
    process = started("compact", files / "dense", trained / "adapter", out, code=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "File too large" in err, err
    assert content(out) == before and sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_stdout_that_is_full_or_closed():
    with open("/dev/full", "w") as full:
        process = started("--help", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "No space left on device" in err and len(err.splitlines()) == 1, err
    reader, writer = os.pipe()
    os.close(reader)
    process = started("--help", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == ""


@pytest.mark.slow
def test_ctrl_c(files, tmp_path):
    process = started(*train(files, tmp_path / "out", "--max-steps", 100_000), stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / "checkpoints" / "run.json"
    for _ in range(600):
        if checkpoints.exists():
            break
        time.sleep(0.1)
    time.sleep(2)
    err = None
    for _ in range(6):  # Python drops one that arrives while a destructor runs
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=20)
            break
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    assert err is not None, "still running"
    err = re.sub("Exception ignored in.*?KeyboardInterrupt: ?\n", "", err, flags=re.DOTALL)
    assert process.returncode == 130 and "Traceback" not in err, err


def test_weights_and_activations_that_do_not_go_together(files, trained, refused):
    ours = trained / "compact", "--data", files / "scores.csv", "--max-length", 16
    for command in (("eval", *ours), ("bench", trained / "compact")):
        refused("activations must be one of ('auto', 'float', 'int8') (got 'fp8')", *command, "--activations", "fp8")
        refused("activations must be auto or float with fp32 weights", *command, "--activations", "int8")


def test_rule_stock_of_embeddings(tmp_path):
    """OUT/stock is a folder of transformers alone."""
    from prunekern.cli.embeddings import train_embeddings
    from prunekern.pruning.config import PruneConfig
    from prunekern.training.recipe import TrainOptions

    with pytest.raises(ValueError, match=r"--rule must be learned with --task embeddings \(got 'stock'\)"):
        train_embeddings("m", "m", None, PruneConfig(), TrainOptions(rule="stock"), tmp_path, False, None)
