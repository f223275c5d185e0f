"""Prune with transformers' Seq2SeqTrainer: any subclass of Trainer takes the callback and its optimiser.

The model is tiny and random so that this runs in seconds, and needs no network; put yours in its place.
"""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

import prunekern as pk

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, num_hidden_layers=2,
        vocab_size=50, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
ids = torch.randint(3, 50, (128, 12))
ids[:, 6:] = ids[:, :6]  # the second half repeats the first
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
data = data.add_column("labels", ids.tolist())

with tempfile.TemporaryDirectory() as folder:
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.3))
    args = Seq2SeqTrainingArguments(
        output_dir=folder, max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, report_to=[],
        eval_strategy="steps", eval_steps=10, save_steps=10, load_best_model_at_end=True, logging_steps=20,
        metric_for_best_model="eval_loss", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data.select(range(32)),
        callbacks=[pk.PruneCallback(pruner)],
        optimizers=(pk.optimizer(pruner, args), None),
    )
    trainer.train()
    print(f"best of those that meet the budget: step {trainer.state.best_global_step}")
    model.eval()
    small = pk.compact(model)
    with torch.no_grad():
        difference = (small(ids[:4]).logits - model(ids[:4]).logits).abs().max()
    print(f"{pk.plan(small).sparsity():.3f} of the block parameters removed; logits differ by {difference:.1e}")
    assert difference < 1e-4 and trainer.state.best_global_step >= 39
