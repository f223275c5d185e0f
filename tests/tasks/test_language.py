"""Running text: blocks, splits, perplexity, and a decoder trained on a local file through the command."""

import json
import math

import pytest
import torch

import prunekern as pk
from prunekern import tasks
from prunekern.tasks.language import language_task, token_losses
from prunekern.training.recipe import evaluate
from tests.helpers.tiny_decoders import VOCAB, build
from tests.helpers.tiny_tokenizer import WORDS, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def documents(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (12,), generator=g)) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents(60)) + "\n\n\n", encoding="utf-8")
    return path


def test_a_file_becomes_three_splits_without_overlap(corpus, tmp_path):
    task = tasks.get(corpus)
    texts = {name: list(data["text"]) for name, data in task.splits.items()}
    assert {n: len(t) for n, t in texts.items()} == {"train": 48, "validation": 6, "test": 6}
    assert sorted(sum(texts.values(), [])) == sorted(documents(60))
    assert task.metric == "perplexity" and task.score_split == "test" and task.name == "corpus.txt"
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(documents(5, seed=1)), encoding="utf-8")
    given = tasks.get(corpus, test=other)
    assert list(given.splits["test"]["text"]) == documents(5, seed=1)
    assert len(given.splits["train"]) == 54
    assert [len(d) for d in tasks.get(corpus).take(train=7, test=2).splits.values()] == [7, 6, 2]


def test_blocks_are_the_text_in_order(tokenizer):
    task = language_task("it", {"train": ["the cat sat", "on a"], "validation": ["the cat"], "test": ["dogs run over"]})
    encoded = task.encode(tokenizer, 3)
    ids = {w: i + 4 for i, w in enumerate(WORDS)}
    assert encoded["train"]["input_ids"] == [[ids["the"], ids["cat"], ids["sat"]], [2, ids["on"], ids["a"]]]
    assert encoded["train"]["labels"] == encoded["train"]["input_ids"]
    batch = task.collator(tokenizer)([encoded["train"][0], encoded["train"][1]])
    assert batch["input_ids"].shape == (2, 3) and batch["input_ids"].dtype == torch.int64


def test_perplexity_is_that_of_the_definition(tokenizer):
    model = build(vocab_size=VOCAB, dtype=torch.float64)
    task = language_task("it", {"train": documents(3), "validation": documents(3), "test": documents(9, seed=3)})
    metrics, losses = evaluate(model, tokenizer, task, 16)
    total, count = 0.0, 0
    for row in task.encode(tokenizer, 16)["test"]["input_ids"]:
        with torch.no_grad():
            p = model(torch.tensor([row])).logits[0].softmax(-1)
        total -= sum(math.log(p[i, row[i + 1]]) for i in range(15))
        count += 15
    assert metrics == {"perplexity": pytest.approx(math.exp(total / count), rel=1e-6)}
    assert losses.numel() == count
    with torch.no_grad():
        ids = torch.tensor([row])
        assert token_losses(model, ids).mean().item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: p.write_bytes(b"\xff\xfe"), ValueError, "is not UTF-8 text"),
        (lambda p: p.write_text(" \n\n "), ValueError, "holds no text"),
        (
            lambda p: p.write_text("one\n\ntwo"),
            ValueError,
            "2 rows .* too few to draw test and validation",
        ),
        (lambda p: None, FileNotFoundError, "data file .*no.txt does not exist"),
        (lambda p: p.mkdir(), FileNotFoundError, "data file .*no.txt is a folder"),
    ],
)
def test_files_that_cannot_be_used(make, error, message, tmp_path):
    path = tmp_path / "no.txt"
    make(path)
    with pytest.raises(error, match=message):
        tasks.get(path)


def test_blank_lines_with_blanks_a_mark_and_line_ends(tmp_path):
    path = tmp_path / "A.TXT"
    path.write_bytes("\ufeffone\r\ntwo\r\n \t\r\nthree\r\n\r\n\r\nfour".encode())
    found = [text for data in tasks.get(path, validation=path, test=path).splits.values() for text in data["text"]]
    assert found == ["one\ntwo", "three", "four"] * 3


def test_options_that_do_not_fit(corpus, tokenizer):
    with pytest.raises(ValueError, match="takes no option 'label'"):
        tasks.get(corpus, label="x")
    with pytest.raises(ValueError, match=r"test_share must be in \(0, 1\) \(got 1.5\)"):
        tasks.get(corpus, test_share=1.5)
    with pytest.raises(ValueError, match=r"max_length must be in 2..64 \(got 65\)"):
        tasks.get(corpus).encode(tokenizer, 65)
    tokenizer.model_max_length, limit = int(1e30), tokenizer.model_max_length
    with pytest.raises(ValueError, match=r"max_length must be at least 2 \(got 1\)"):
        tasks.get(corpus).encode(tokenizer, 1)
    tokenizer.model_max_length = limit
    with pytest.raises(ValueError, match=r"max_length must be at most the 13 tokens of split 'test' \(got 20\)"):
        language_task("it", {"train": documents(3), "validation": documents(3), "test": documents(1)}).encode(
            tokenizer, 20
        )


def test_the_command_trains_a_decoder_on_a_text_file(corpus, tokenizer, tmp_path):
    from typer.testing import CliRunner

    from prunekern.cli import app

    build().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    before = evaluate(build(), tokenizer, tasks.get(corpus), 16)[0]["perplexity"]
    out, run = tmp_path / "out", CliRunner()
    common = ["--data", str(corpus), "--max-length", "16"]
    done = run.invoke(
        app,
        [
            "train",
            "--model",
            str(tmp_path / "base"),
            "--out",
            str(out),
            *common,
            "--max-steps",
            "20",
            "--rank",
            "4",
            "--lr",
            "1e-2",
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    masked, compact = (report["score"][k]["perplexity"] for k in ("masked", "compact"))
    assert compact == pytest.approx(masked, rel=1e-4) and 1 < compact < before
    assert 0.25 <= report["trained"]["sparsity"] < 0.26
    assert f"test perplexity: {masked:.3f} before removal" in " ".join(done.output.split())
    done = run.invoke(app, ["eval", str(out / "compact"), *common], catch_exceptions=False)
    assert f"perplexity {compact:.3f}" in done.output
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"{d},{i % 2}" for i, d in enumerate(documents(40))))
    done = run.invoke(app, ["eval", str(out / "compact"), "--data", str(tmp_path / "rows.csv"), "--max-length", "16"])
    assert isinstance(done.exception, ValueError) and "has no tensor 'score.weight'" in str(done.exception)
    small = pk.load(out / "compact")
    ids = torch.tensor([[5, 6, 7]])
    assert small.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] <= 7


def test_a_decoder_learns_to_classify(tokenizer, tmp_path):
    """A base model and a tokenizer without a padding token, as LLaMA's are; labels told by one word."""
    from prunekern.training.recipe import TrainOptions, fine_tune, load_dense

    model = build(pad_token_id=None)
    model.save_pretrained(tmp_path / "base")
    bare = tokenizer.__class__(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", unk_token="<unk>",
                               model_max_length=64)  # fmt: skip
    bare.save_pretrained(tmp_path / "base")
    rows = [f"{w} {'cat' if i % 2 else 'dogs'} {w}" for i, w in enumerate(WORDS * 6)]
    lines = [json.dumps({"text": r, "label": int("cat" in r)}) for r in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    task = tasks.get(tmp_path / "rows.jsonl")
    dense, own = load_dense(str(tmp_path / "base"), task)
    assert own.pad_token == "</s>" and dense.config.pad_token_id == own.pad_token_id == 2
    options = TrainOptions(max_steps=60, batch_size=16, learning_rate=1e-2, max_length=16)
    pruner, _ = fine_tune(dense, own, task, pk.PruneConfig(rank=4, sparsity=0.25), options, tmp_path / "out")
    small = pk.compact(pruner.model)
    assert evaluate(small, own, task, 16)[0] == evaluate(pruner.model, own, task, 16)[0] == {"accuracy": 1.0}
