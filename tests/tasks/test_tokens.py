"""A tag for every word: read from every format, put at the first token of its word, scored; what is wrong, by place."""

import json

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from prunekern import tasks
from prunekern.tasks import metrics

WORDS = [["EU", "dog", "is", "a", "bad", "cat"], ["the", "film"], ["dog", "cats", "an", "good"]] * 9
TAGS = [["B-ORG", "O", "O", "O", "B-X", "I-X"], ["O", "B-X"], ["B-X", "I-X", "O", "O"]] * 9


def number(n, words):
    return [f"w{n}", *words[1:]]  # no two sentences the same: splits are drawn by them


ROWS = [(number(n, words), tags) for n, (words, tags) in enumerate(zip(WORDS, TAGS, strict=True))]


def lines(path, rows=ROWS, names=("tokens", "tags")):
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def conll(path, rows=ROWS, between="\t"):
    path.write_text("\n".join("".join(f"{w}{between}{t}\n" for w, t in zip(*row, strict=True)) for row in rows))
    return path


def contents(task):
    found = {}
    for data in task.splits.values():
        for words, tags in zip(data[task.text_columns[0]], data[task.label_column], strict=True):
            found[words[0]] = (list(words), [task.label_names[tag] if tag >= 0 else tag for tag in tags])
    return found


def test_every_format_is_the_same_task(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"tokens": [words for words, _ in ROWS], "tags": [tags for _, tags in ROWS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for task in (
        tasks.get(lines(tmp_path / "a.jsonl")),
        tasks.get(lines(tmp_path / "b.jsonl", names=("words", "ner")), text="words", label="ner"),
        tasks.get(lines(tmp_path / "c.jsonl", names=("text", "label"))),
        tasks.get(lines(tmp_path / "d.jsonl"), task_type="tokens"),
        tasks.get(tmp_path / "a.parquet"),
        tasks.get(conll(tmp_path / "a.conll")),
        tasks.get(conll(tmp_path / "a.txt"), task_type="tokens"),
        tasks.get(conll(tmp_path / "a.tsv"), task_type="tokens"),
        tasks.get(conll(tmp_path / "b.bio", between=" ")),
    ):
        assert isinstance(task, tasks.TokenTask) and task.task_type == "tokens" and task.metric == "entity_f1"
        assert task.label_names == ("B-ORG", "B-X", "I-X", "O")
        assert contents(task) == {words[0]: (words, tags) for words, tags in ROWS}
        assert {split: len(data) for split, data in task.splits.items()} == {"train": 21, "validation": 3, "test": 3}
    both = tasks.get(lines(tmp_path / "a.jsonl"), validation=conll(tmp_path / "v.conll", ROWS[:2]), test_share=0)
    assert [words for words in both.splits["validation"]["tokens"]] == [ROWS[0][0], ROWS[1][0]]
    assert isinstance(tasks.get(lines(tmp_path / "m.jsonl", [(" ".join(w), t) for w, t in ROWS], ("text", "label"))),
                      tasks.MultiLabelTask)  # fmt: skip


def test_tags_that_mark_no_spans(tmp_path):
    numbers = [(words, [place % 3 for place in range(len(words))]) for words, _ in ROWS]
    task = tasks.get(lines(tmp_path / "a.jsonl", numbers))
    assert (task.label_names, task.metric) == (("0", "1", "2"), "accuracy")
    logits = np.zeros((1, 3, 3))
    logits[0, :, 1] = 1
    assert task.compute_metrics(EvalPrediction(logits, np.array([[0, 1, -100]]))) == {"accuracy": 0.5}
    mixed = [*ROWS, (["a", "b"], ["PER", "O"])]
    assert tasks.get(lines(tmp_path / "b.jsonl", mixed), metric="accuracy").metric == "accuracy"
    for rows, options in ((mixed, {}), (mixed, {"metric": "entity_f1"}), (numbers, {"metric": "entity_f1"})):
        with pytest.raises(tasks.DataError, match=r"c\.jsonl line \d+: tag '(PER|0)' is neither O nor marks a span"):
            tasks.get(lines(tmp_path / "c.jsonl", rows), **options)


def test_labels_stand_at_the_first_token_of_a_word(tmp_path, tokenizer):
    """Against words tokenized one by one."""
    task = tasks.get(lines(tmp_path / "a.jsonl", [*ROWS, (["cats", "ins", "an"], ["B-X", -100, "O"])]))
    cut = 0
    for split, rows in task.encode(tokenizer, max_length=6).items():
        assert set(rows.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels", "length"}
        for row, words, tags in zip(rows, task.splits[split]["tokens"], task.splits[split]["tags"], strict=True):
            ids, labels = [], []
            for word, tag in zip(words, tags, strict=True):
                pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
                ids += pieces
                labels += [tag] + [-100] * (len(pieces) - 1)
            cut += len(ids) > 4
            assert row["input_ids"] == [tokenizer.cls_token_id, *ids[:4], tokenizer.sep_token_id]
            assert row["labels"] == [-100, *labels[:4], -100] and row["length"] == len(row["labels"])
    assert cut == sum(task.count_cut(tokenizer, 6, split) for split in task.splits) > 0
    assert any(len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1 for words, _ in ROWS for word in words)


def test_tokens_of_bytes_know_their_blank(tmp_path):
    """As of RoBERTa and GPT-2, whose tokens take in the blank before them, and may be half a character."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=letters, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="!", model_max_length=64)
    rows = [([f"é{n}", "ab", "c"], ["B-X", "O", "B-X"]) for n in range(10, 30)]
    task = tasks.get(lines(tmp_path / "a.jsonl", rows))
    for row in task.encode(tokenizer, max_length=20)["train"]:
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert tokens[:2] == ["Ã", "©"] and tokens[4:] == ["Ġ", "a", "b", "Ġ", "c"]
        assert row["labels"] == [0, -100, -100, -100, -100, 1, -100, -100, 0]


def test_batches_and_loss(tmp_path, tokenizer):
    from transformers import BertConfig, BertForTokenClassification

    task = tasks.get(lines(tmp_path / "a.jsonl"))
    encoded = task.encode(tokenizer)["train"]
    rows = [encoded[n] for n in range(7)]
    batch = task.collator(tokenizer, pad_to_multiple_of=8)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == batch["input_ids"].shape == (7, 8)
    for labels, row in zip(batch["labels"], rows, strict=True):
        assert labels[: row["length"]].tolist() == row["labels"] and (labels[row["length"] :] == -100).all()
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(**shape, vocab_size=len(tokenizer), **task.model_kwargs())
    assert (config.num_labels, config.problem_type, config.label2id["O"]) == (4, None, 3)
    out = BertForTokenClassification(config).eval()(**batch)
    assert isinstance(task.model_class().from_config(config), BertForTokenClassification)
    counts = batch["labels"] != -100
    chosen = out.logits.log_softmax(-1)[counts].gather(1, batch["labels"][counts][:, None])
    torch.testing.assert_close(out.loss, -chosen.mean(), rtol=1e-5, atol=1e-6)


def test_metrics_by_hand(tmp_path):
    task = tasks.get(lines(tmp_path / "a.jsonl"))  # B-ORG, B-X, I-X, O
    labels = np.array([[-100, 1, 2, -100, 3, -100], [-100, 0, 3, -100, -100, -100]])
    said = np.array([[3, 1, 2, 0, 1, 0], [0, 0, 2, 1, 1, 1]])  # X 1-2 right, X 4 wrong; ORG 1 right, X 2 wrong
    found = task.compute_metrics(EvalPrediction(np.eye(4)[said], labels))
    assert list(found) == ["entity_f1", "accuracy"]
    assert found["accuracy"] == pytest.approx(3 / 5) and found["entity_f1"] == pytest.approx(2 * 2 / (2 + 4))
    poisoned = np.where((labels == -100)[..., None], np.nan, np.eye(4)[said])  # what does not count may be anything
    assert metrics.score_tokens((poisoned, "states"), labels, task.label_names) == found
    words = tasks.get(lines(tmp_path / "b.jsonl"), metric="accuracy").compute_metrics(EvalPrediction(poisoned, labels))
    assert list(words) == ["accuracy", "entity_f1"]
    for logits, wrong, pattern in (
        (np.full((2, 6, 4), np.nan), labels, "predictions must be finite"),
        (np.ones((2, 6, 3)), labels, r"logits \[rows, tokens, 4\]"),
        (np.ones((2, 6, 4)), labels * 0 - 100, "labels must not all be -100"),
        (np.ones((2, 6, 4)), labels + 1, r"labels must be in 0..3, or -100 \(got -99\)"),
    ):
        with pytest.raises(ValueError, match=pattern):
            metrics.score_tokens(logits, wrong, task.label_names)


def test_scores_of_batches_are_those_of_rows(tmp_path, tokenizer):
    """Two batches of unlike widths, in the order of lengths; by our `evaluate` and by transformers' Trainer."""
    from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments

    from prunekern.training.recipe import evaluate

    rows = [([f"w{n}", *["cat", "dogs", "an"] * (n % 5)], ["O", *["B-X", "I-X", "O"] * (n % 5)]) for n in range(90)]
    task = tasks.get(lines(tmp_path / "a.jsonl", rows), test=lines(tmp_path / "t.jsonl", rows))
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=1.0, **task.model_kwargs())
    model = BertForTokenClassification(config).eval()
    encoded, right, total = task.encode(tokenizer, 24)["test"], 0, 0
    found, logits = evaluate(model, tokenizer, task, 24)
    for n, row in enumerate(encoded):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(logits[n, : row["length"]], alone, rtol=1e-4, atol=1e-5)
        counted = [(tag, want) for tag, want in zip(alone.argmax(1).tolist(), row["labels"], strict=True) if want >= 0]
        right, total = right + sum(tag == want for tag, want in counted), total + len(counted)
    assert total == sum(len(words) for words, _ in rows) and found["accuracy"] == pytest.approx(right / total)
    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, arguments, task.collator(tokenizer), compute_metrics=task.compute_metrics)
    theirs = trainer.evaluate(encoded)
    assert {name: theirs[f"eval_{name}"] for name in found} == pytest.approx(found)


def test_rows_of_which_nothing_is_left(tmp_path, tokenizer):
    far = (["a", "b", "c", "d"], [-100, -100, -100, "O"])
    task = tasks.get(lines(tmp_path / "train.jsonl", [*ROWS, far]), validation=lines(tmp_path / "v.jsonl", ROWS),
                     test=lines(tmp_path / "t.jsonl", ROWS))  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 28 rows of split 'train' have no labelled word in 5 tokens"):
        encoded = task.encode(tokenizer, max_length=5)
    assert {split: len(rows) for split, rows in encoded.items()} == {"train": 27, "validation": 27, "test": 27}
    assert len(task.encode(tokenizer)["train"]) == 28
    alone = tasks.get(lines(tmp_path / "train.jsonl"), validation=lines(tmp_path / "v.jsonl", [far]), test_share=0,
                      metric="accuracy")  # fmt: skip
    with pytest.raises(ValueError, match="max_length must leave a labelled word in split 'validation'"):
        alone.encode(tokenizer, max_length=5)
    for length in (2, 513):
        with pytest.raises(ValueError, match=rf"max_length must be in 3..512 \(got {length}\)"):
            task.encode(tokenizer, max_length=length)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((["a", "b"], ["O"]), "2 words, but 1 tags; every word has one"),
        ((["a"], ["O", "O"]), "1 words, but 2 tags; every word has one"),
        (([], []), "there are no words"),
        ((["a", None], ["O", "O"]), "word 2 of 'tokens' must be a string (got NoneType)"),
        ((["a", " "], ["O", "O"]), "word 2 of 'tokens' is blank"),
        ((["a", "\ud83d"], ["O", "O"]), "word 2 of 'tokens' holds half a character"),
        ((["a", "b"], ["O", None]), ", word 2: tag is null"),
        ((["a", "b"], ["O", float("nan")]), ", word 2: tag is null"),
        ((["a", "b"], ["O", ""]), ", word 2: label 'tags' is blank"),
        ((["a", "b"], ["O", 0.5]), ", word 2: label 'tags' must be a class, not a fraction (got 0.5)"),
        ((["a", "b"], [-100, "-100"]), "every tag is -100, which asks about no word"),
        (("a b", ["O", "O"]), "words must be a list, one for each word (got str)"),
        ((["a"], "O"), "tags must be a list, one for each word (got str)"),
        ((None, ["O"]), "words are null"),
        ((["a"], None), "tags are null"),
    ],
)
def test_rows_that_are_wrong(tmp_path, row, message):
    with pytest.raises(tasks.DataError) as caught:
        tasks.get(lines(tmp_path / "a.jsonl", [*ROWS, row]))
    assert f"a.jsonl line 28{'' if message[0] == ',' else ': '}{message}" in str(caught.value)


def test_data_that_does_not_fit(tmp_path):
    path = lines(tmp_path / "a.jsonl")
    for rows, pattern in (
        (
            [(["a", "b"], ["O", "B-Y"])],
            r"t\.conll line 1, word 2: label 'B-Y' of the test file is unknown; training has",
        ),
        ([(["a", "b"], ["O", "O"])], r"t\.conll: no scored row \(1\) has an entity, where entity_f1 is undefined"),
    ):
        with pytest.raises(tasks.DataError, match=pattern):
            tasks.get(path, test=conll(tmp_path / "t.conll", rows))
    with pytest.raises(tasks.DataError, match=r"b\.jsonl: label 'tags' needs 2 classes or more \(got only 'O'\)"):
        tasks.get(lines(tmp_path / "b.jsonl", [([f"w{n}"], ["O"]) for n in range(30)]))
    for given, options, pattern in (
        (path, {"task_type": "classification"}, "column 'text' is missing; there are tokens, tags"),
        (path, {"task_type": "classification", "text": "tokens", "label": "tags"}, "text 'tokens' must be a string"),
        (path, {"text": ("tokens", "x")}, "column 'x' is missing"),
        (path, {"task_type": "tokens", "text": ("tokens", "x")}, "text must be one column of words"),
        (
            conll(tmp_path / "a.conll"),
            {"task_type": "regression"},
            "task_type must be 'tokens' with extension '.conll'",
        ),
        (tmp_path / "a.conll", {"label": "ner"}, "has no named columns: text and label must not be given"),
        (conll(tmp_path / "a.tsv"), {"task_type": "tokens", "text": "w"}, "a.tsv has no named columns"),
        (path, {"label": ""}, "column '' is missing; there are tokens, tags"),
        (tmp_path / "no.conll", {}, "no.conll does not exist"),
        (conll(tmp_path / "a.txt"), {"task_type": "multi-label"}, "takes no option 'task_type'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            tasks.get(given, **options)
        assert pattern in str(caught.value)
