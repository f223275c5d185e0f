"""Prune a reranker with sentence-transformers' CrossEncoderTrainer, on pairs with labels.

The model is tiny and random so that this runs in seconds, and needs no network; put yours in its place.
"""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import prunekern as pk

WORDS = "the cat sat on a mat and saw some dogs run over hills while birds sang songs of spring".split()


def tiny(folder):
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "<sep>", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", sep_token="<sep>")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "num_hidden_layers": 2}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=30, num_labels=1)).save_pretrained(folder)
    return CrossEncoder(folder, device="cpu", max_length=24)


with tempfile.TemporaryDirectory() as folder:
    model = tiny(f"{folder}/tiny")
    queries = [WORDS[i % len(WORDS)] for i in range(256)]
    answers = [" ".join(WORDS[(i + k * (i % 2) + 1 - i % 2) % len(WORDS)] for k in range(4)) for i in range(256)]
    labels = [float(q in a.split()) for q, a in zip(queries, answers, strict=True)]

    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3))
    args = CrossEncoderTrainingArguments(
        output_dir=f"{folder}/run", max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        save_strategy="no", logging_steps=20, disable_tqdm=True,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"query": queries, "answer": answers, "label": labels}),
        loss=BinaryCrossEntropyLoss(model),
        callbacks=[pk.PruneCallback(pruner)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()

    pairs = list(zip(queries[:20], answers[:20], strict=True))
    masked = model.predict(pairs)
    small = pk.compact(model)
    difference = abs(small.predict(pairs) - masked).max()
    print(f"{pk.plan(small).sparsity():.3f} of the block parameters removed; scores differ by {difference:.1e}")
    assert difference < 1e-4
