"""Prune a SentenceTransformer with its own trainer: it is its own teacher, texts need no labels.

The model is tiny and random so that this runs in seconds, and needs no network; put yours in its place:
`model = SentenceTransformer("all-MiniLM-L6-v2")`, and texts like those that you will embed.
"""

import tempfile

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import prunekern as pk

WORDS = "the cat sat on a mat and saw some dogs run over hills while birds sang songs of spring".split()


def tiny(folder):
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    config = BertConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=256, num_hidden_layers=2, vocab_size=30
    )
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(folder, max_seq_length=16)
    return SentenceTransformer(modules=[transformer, Pooling(64, pooling_mode="mean")], device="cpu")


with tempfile.TemporaryDirectory() as folder:
    model = tiny(f"{folder}/tiny")
    texts = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 4 + i % 9)) for i in range(256)]
    before = model.encode(texts[:50])

    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3))
    loss = pk.DistilLoss(model, pruner)
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{folder}/run", max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        save_strategy="no", logging_steps=20, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": texts}),
        loss=loss,
        callbacks=[pk.PruneCallback(pruner, stage_one=0.5, warm=0.2, distil=loss)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()

    small = pk.compact(model)
    pk.save(small, f"{folder}/small")
    # In a process that imports prunekern.hf, SentenceTransformer(f"{folder}/small") loads it, too.
    again = pk.load(f"{folder}/small", weights="int8")
    after = again.encode(texts[:50])
    cosine = (before * after).sum(1) / ((before**2).sum(1) * (after**2).sum(1)) ** 0.5
    print(f"{pk.plan(again).sparsity():.3f} of the block parameters removed; mean cosine {cosine.mean():.4f}")
    assert cosine.mean() > 0.9
