"""What every task does with its splits: encoding, padding, subsets, model arguments; and what importing costs."""

import subprocess
import sys

import pytest
import torch

from prunekern import tasks


@pytest.fixture
def task(tmp_path):
    words = ["a", "dog", "cat", "good", "bad", "film"]
    rows = "".join(
        f'{{"text": "{" ".join(words[(n * k) % 6] for k in range(n % 11 + 1))} {n}", "label": {n % 2}}}\n'
        for n in range(60)
    )
    (tmp_path / "a.jsonl").write_text(rows)
    return tasks.get(tmp_path / "a.jsonl")


def test_encode_is_the_tokenizer_cut_and_not_padded(task, tokenizer):
    for split, data in task.encode(tokenizer, max_length=7).items():
        assert set(data.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
        for row, text, label in zip(data, task.splits[split]["text"], task.splits[split]["label"], strict=True):
            expected = tokenizer(text)["input_ids"]
            cut = expected if len(expected) <= 7 else expected[:6] + [tokenizer.sep_token_id]
            assert (row["input_ids"], row["attention_mask"]) == (cut, [1] * len(cut))
            assert (row["labels"], row["length"]) == (label, len(cut))
    assert max(task.encode(tokenizer, max_length=7)["train"]["length"]) == 7  # something was cut


def test_encode_follows_the_tokenizer_in_what_it_returns(task, tokenizer):
    from transformers import DistilBertTokenizer

    plain = DistilBertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=512)
    assert set(task.encode(plain)["train"].column_names) == {"input_ids", "attention_mask", "labels", "length"}


def test_collator_pads_to_the_longest_row_of_the_batch(task, tokenizer):
    rows = [task.encode(tokenizer)["train"][index] for index in range(5)]
    batch = task.collator(tokenizer)(rows)
    longest = max(row["length"] for row in rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}  # no length: models refuse it
    assert batch["input_ids"].shape == (5, longest) and batch["labels"].dtype == torch.int64
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], rows, strict=True):
        assert (
            ids[: row["length"]].tolist() == row["input_ids"] and (ids[row["length"] :] == tokenizer.pad_token_id).all()
        )
        assert mask.sum() == row["length"]
    assert task.collator(tokenizer, pad_to_multiple_of=8)(rows)["input_ids"].shape[1] == -(-longest // 8) * 8
    assert "length" in rows[0]  # the rows themselves are left alone


@pytest.mark.parametrize("max_length", [2, 0, -1, 513])
def test_max_length_out_of_range(task, tokenizer, max_length):
    with pytest.raises(ValueError, match=rf"encode: max_length must be in 3..512 \(got {max_length}\)"):
        task.encode(tokenizer, max_length=max_length)


def test_take(task):
    whole = {split: set(data["text"]) for split, data in task.splits.items()}
    ten, five = task.take(train=10, test=1), task.take(train=5)
    assert {split: len(data) for split, data in ten.splits.items()} == {"train": 10, "validation": 6, "test": 1}
    assert ten.splits["train"]["text"][:5] == five.splits["train"]["text"][:]  # the smaller is in the larger
    assert len(set(ten.splits["train"]["text"])) == 10 and set(ten.splits["train"]["text"]) <= whole["train"]
    assert task.take(train=10, seed=1).splits["train"]["text"][:] != ten.splits["train"]["text"][:]
    assert set(task.take(train=10**6).splits["train"]["text"]) == whole["train"]
    assert set(task.splits["train"]["text"]) == whole["train"]
    with pytest.raises(ValueError, match=r"take: validation must be at least 1 row \(got 0\)"):
        task.take(validation=0)


def test_model_kwargs_build_the_head(task, tmp_path):
    from transformers import AutoModelForSequenceClassification, BertConfig

    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = AutoModelForSequenceClassification.from_config(BertConfig(**shape, **task.model_kwargs()))
    assert (model.config.num_labels, model.config.id2label) == (2, {0: "0", 1: "1"})
    assert model.config.problem_type == "single_label_classification"
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "t{n}", "label": {n / 3}}}\n' for n in range(20)))
    regression = tasks.get(tmp_path / "b.jsonl", regression=True)
    model = AutoModelForSequenceClassification.from_config(BertConfig(**shape, **regression.model_kwargs()))
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_trainer_takes_it_as_it_is(task, tokenizer, tmp_path):
    """Columns, collator, length bucketing and metrics through transformers' own Trainer."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(**shape, vocab_size=len(tokenizer), **task.model_kwargs()))
    encoded = task.encode(tokenizer, max_length=16)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="group_by_length",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        data_collator=task.collator(tokenizer),
        compute_metrics=task.compute_metrics,
    )
    trainer.train()
    predicted = trainer.predict(encoded["validation"])
    right = (predicted.predictions.argmax(1) == encoded["validation"]["labels"][:]).mean()
    assert predicted.metrics["test_accuracy"] == pytest.approx(right)


def test_importing_is_cheap():
    code = (
        "import sys, prunekern.tasks as t; t.names()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'sklearn', 'prunekern.cli'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_names():
    assert set(tasks.names()) == {
        "reviews",
        "topics",
        "tweets",
        "wikipedia",
        "winogrande",
        "science",
        "mrpc",
        "rte",
        "sst2",
        "mnli",
        "cola",
        "qnli",
        "qqp",
        "stsb",
    }
