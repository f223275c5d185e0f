"""Multiple choice: items of files and archives, log-likelihoods by the definition, and a decoder trained on them."""

import json

import pytest
import torch
from tokenizers import processors

import prunekern as pk
from prunekern import tasks
from prunekern.tasks.choice import Item, choice_task, log_likelihoods
from prunekern.tasks.sources import science, winogrande
from prunekern.tasks.task import DataError
from prunekern.training.recipe import evaluate
from tests.helpers.tiny_decoders import VOCAB, build
from tests.helpers.tiny_tokenizer import WORDS, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def items(count, seed=0, choices=3):
    g = torch.Generator().manual_seed(seed)

    def text(words):
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (words,), generator=g))

    return [
        Item([text(3 + i % 4)] * choices, [" " + text(1 + (i + j) % 3) for j in range(choices)], i % choices)
        for i in range(count)
    ]


def by_definition(model, tokenizer, context, continuation):
    whole = tokenizer(context + continuation)["input_ids"]
    known = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(p[i - 1, whole[i]].item() for i in range(known, len(whole)))


def test_log_likelihoods_and_accuracy_are_those_of_the_definition(tokenizer):
    model = build(vocab_size=VOCAB, dtype=torch.float64).eval()
    every = items(21) + items(4, seed=2, choices=2)  # items of fewer choices share batches with the others
    task = choice_task("it", {"train": every[:2], "validation": every[:2], "test": every})
    metrics, scores = evaluate(model, tokenizer, task, 16)
    want = [[by_definition(model, tokenizer, c, e) for c, e in zip(*i[:2], strict=True)] for i in every]
    for row, found in zip(want, scores, strict=True):
        # fp32 from the logits on: at most 3 tokens, each a few roundings (6e-8) of numbers below 8
        torch.testing.assert_close(found[: len(row)].double(), torch.tensor(row).double(), rtol=0, atol=1e-5)
        assert (found[len(row) :] == float("-inf")).all()
    right = sum(max(range(len(row)), key=row.__getitem__) == i.label for row, i in zip(want, every, strict=True))
    assert metrics == {"accuracy": right / len(every)}


def test_the_objective_is_the_cross_entropy_of_the_choices(tokenizer):
    model = build(vocab_size=VOCAB, dtype=torch.float64)
    every = items(5) + items(1, seed=4, choices=2)
    task = choice_task("it", dict.fromkeys(("train", "validation", "test"), every))
    batch = task.collator(tokenizer)(list(task.encode(tokenizer, 16)["train"]))
    loss = task.objective(model, batch)
    want = []
    for item in every:
        row = [by_definition(model, tokenizer, c, e) for c, e in zip(*item[:2], strict=True)]
        want.append(-torch.tensor(row).log_softmax(0)[item.label].item())
    assert loss.item() == pytest.approx(sum(want) / len(want), rel=1e-5)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


def test_a_tokenizer_that_ends_every_text_counts_the_same_tokens(tokenizer):
    ending = word_tokenizer()
    end, begin = ending.eos_token, ending.bos_token
    both = [(end, ending.eos_token_id), (begin, ending.bos_token_id)]
    ending._tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A {end}", special_tokens=both)
    assert ending("the cat")["input_ids"][-1] == ending.eos_token_id
    every = items(6)
    task = choice_task("it", dict.fromkeys(("train", "validation", "test"), every))
    plain, ended = (task.encode(t, 32)["test"] for t in (tokenizer, ending))
    assert plain["counted"] == ended["counted"]
    for a, b in zip(plain["input_ids"], ended["input_ids"], strict=True):
        assert b == [[ending.bos_token_id, *ids] for ids in a]


def test_a_long_context_loses_its_beginning(tokenizer):
    model = build(vocab_size=VOCAB, dtype=torch.float64).eval()
    item = Item([" ".join(WORDS)] * 2, [" cat", " dogs run"], 1)
    task = choice_task("it", dict.fromkeys(("train", "validation", "test"), [item]))
    row = task.encode(tokenizer, 6)["test"][0]
    whole = [tokenizer(c + e)["input_ids"] for c, e in zip(*item[:2], strict=True)]
    assert row["input_ids"] == [ids[-6:] for ids in whole] and row["counted"] == [1, 2] and row["length"] == 6
    scores = log_likelihoods(model, task.collator(tokenizer)([row]))
    kept = [tokenizer.decode(ids[-6:-count]) for ids, count in zip(whole, row["counted"], strict=True)]
    for found, context, continuation in zip(scores[0], kept, item.continuations, strict=True):
        assert found.item() == pytest.approx(by_definition(model, tokenizer, context, continuation), rel=1e-5)
    with pytest.raises(ValueError, match=r"leave room before the 2 tokens of ' dogs run' \(got 2\)"):
        task.encode(tokenizer, 2)
    with pytest.raises(ValueError, match=r"max_length must be in 2..64 \(got 65\)"):
        task.encode(tokenizer, 65)


def rows(count):
    return [
        {"ask": f"{i.contexts[0]} {n}", "options": [c.strip() for c in i.continuations], "answer": i.label}
        for n, i in enumerate(items(count, seed=7))
    ]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


COLUMNS = {"text": "ask", "choices": "options", "label": "answer"}


def test_a_file_of_items_and_a_label_by_its_text(tmp_path):
    records = rows(30)
    task = tasks.get(write(tmp_path / "items.jsonl", records), **COLUMNS)
    assert {n: len(s) for n, s in task.splits.items()} == {"train": 24, "validation": 3, "test": 3}
    assert sorted(c[0] for s in task.splits.values() for c in s["contexts"]) == sorted(r["ask"] for r in records)
    row = task.splits["test"][0]
    record = next(r for r in records if r["ask"] == row["contexts"][0])
    assert row["continuations"] == [" " + c for c in record["options"]] and row["label"] == record["answer"]
    by_text = [{**r, "answer": r["options"][r["answer"]]} for r in records if len(set(r["options"])) == 3]
    other = tasks.get(write(tmp_path / "other.jsonl", by_text), **COLUMNS)
    told = {(*r["contexts"], *r["continuations"]): r["label"] for s in task.splits.values() for r in s}
    for split in other.splits.values():
        assert all(told[(*r["contexts"], *r["continuations"])] == r["label"] for r in split)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"options": ["one"]}, "line 3: choices 'options' must be a list of two strings or more"),
        ({"options": "yes"}, "line 3: choices 'options' must be a list of two strings or more"),
        ({"options": ["a", " "]}, "line 3: text 'options' is blank"),
        ({"answer": 3}, r"line 3: label 'answer' must be one of the choices, or in 0..2 \(got 3\)"),
        ({"answer": "none"}, r"line 3: label 'answer' must be one of the choices, or in 0..2 \(got 'none'\)"),
        ({"answer": True}, "line 3: label 'answer' must be one of the choices"),
        ({"ask": None}, "line 3: text 'ask' is null"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, change, message):
    records = rows(20)
    records[2] |= change
    with pytest.raises(DataError, match=message):
        tasks.get(write(tmp_path / "items.jsonl", records), **COLUMNS)


EXAMPLES = {
    "subtask029_winogrande_full_object": [
        {
            "target": [
                "Sentence 1: The trophy did not fit in the case as the _ was big. \nAnswer1: trophy. \n"
                "Sentence 2: The trophy did not fit in the case as the _ was small. \nAnswer2: case.",
                "no sentences at all",
            ]
        }
    ],
    "subtask042_qasc_incorrect_option_generation": [
        {
            "input": "Fact: Plants need light. \nQuestion: What do plants need? \nCorrect Answer: light.",
            "target": ["mice.", "lamps.", "coal.", "gold."],
        },
        {"input": "Fact: x. \nQuestion: Which? \nCorrect Answer: a.", "target": ["A", "b", "c"]},  # twice the same
    ],
}


def test_archived_items(monkeypatch):
    monkeypatch.setattr("prunekern.tasks.sources.bigbench.instructions", lambda name, subtask: EXAMPLES[subtask])
    first, second = winogrande.records()
    assert first["answer"] == "1" and second["answer"] == "2" and first["twins"] == second["twins"]
    assert winogrande.as_item(second) == Item(
        ["The trophy did not fit in the case as the trophy", "The trophy did not fit in the case as the case"],
        [" was small."] * 2,
        1,
    )
    (row,) = science.records()
    assert sorted(row["choices"]) == ["coal", "lamps", "light", "mice"] and row["choices"][row["label"]] == "light"
    item = science.as_item(row)
    assert item.contexts == ["Question: What do plants need?\nAnswer:"] * 4
    assert item.continuations[item.label] == " light"


def test_a_decoder_trained_on_items_through_the_command(tmp_path, tokenizer):
    """Right answers say "cat": the masks, half of the channels gone, must not keep the model from learning that."""
    from typer.testing import CliRunner

    from prunekern.cli import app

    g = torch.Generator().manual_seed(1)
    records = []
    for n in range(160):
        words = [WORDS[int(i)] for i in torch.randint(2, len(WORDS), (4,), generator=g)]
        records.append({"ask": " ".join(words[:2]), "options": ["cat", words[3]][:: 1 - 2 * (n % 2)], "answer": n % 2})
    write(tmp_path / "items.jsonl", records)
    dense = build(vocab_size=VOCAB)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    given = ["--data", str(tmp_path / "items.jsonl"), "--text", "ask", "--choices", "options", "--label", "answer"]
    made = ["--model", str(tmp_path / "dense"), "--out", str(tmp_path / "run"), "--sparsity", "0.3", "--lr", "1e-2"]
    result = CliRunner().invoke(
        app, ["train", *given, *made, "--epochs", "4", "--max-length", "16"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["score"]["compact"] == report["score"]["masked"]
    assert report["score"]["compact"]["accuracy"] > 0.9  # 0.5 without training
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "run" / "compact"), *given, "--max-length", "16"])
    assert result.exit_code == 0 and f"accuracy {100 * report['score']['compact']['accuracy']:.2f}" in result.output


def test_gradient_accumulation_is_one_large_batch(tmp_path, tokenizer):
    """The loss of a step is the mean over its items, however it is cut into parts."""
    from transformers import TrainingArguments

    every = items(16)
    task = choice_task("it", dict.fromkeys(("train", "validation", "test"), every))
    encoded = task.encode(tokenizer, 16)
    ends = []
    for batch, parts in ((8, 1), (2, 4)):
        model = build(vocab_size=VOCAB)
        pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.25))
        trainer = pk.PruneTrainer(
            args=TrainingArguments(
                str(tmp_path / f"{parts}"), per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
                max_steps=2, report_to=[], remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
                learning_rate=1e-3, logging_steps=1, optim="sgd",
            ),
            pruner=pruner, train_dataset=encoded["train"], data_collator=task.collator(tokenizer),
            objective=task.objective, warm=0.9,
        )  # fmt: skip
        trainer.train()
        ends.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
