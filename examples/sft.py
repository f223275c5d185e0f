"""Prune a language model with TRL's SFTTrainer; beside the labels, the unpruned model teaches the pruned one.

The model is tiny and random so that this runs in seconds, and needs no network; put yours in its place.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import prunekern as pk

torch.manual_seed(0)
WORDS = "the cat sat on a mat and saw some dogs run over hills while birds sang songs of spring".split()
words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, num_hidden_layers=2,
        vocab_size=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )
)  # fmt: skip
texts = [" ".join(WORDS[(i + k) % len(WORDS)] for k in range(3 + i % 9)) for i in range(128)]

with tempfile.TemporaryDirectory() as folder:
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3))
    args = SFTConfig(
        output_dir=folder, max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[], bf16=False,
        save_strategy="no", logging_steps=10, disable_tqdm=True, gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        callbacks=[pk.PruneCallback(pruner, distil=pk.Distillation("logits", weight=0.5))],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()

    ids = torch.tensor([[words[word] for word in texts[5].split()]])
    model.eval()
    small = pk.compact(model)
    with torch.no_grad():
        difference = (small(ids).logits - model(ids).logits).abs().max()
    print(f"{pk.plan(small).sparsity():.3f} of the block parameters removed; logits differ by {difference:.1e}")
    assert difference < 1e-4
