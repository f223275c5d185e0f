"""Prune while fine-tuning with a plain PyTorch loop: no Trainer, any optimiser.

The model is tiny and random so that this runs in seconds; put yours in its place.
"""

import tempfile

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

import prunekern as pk

torch.manual_seed(0)
model = DistilBertForSequenceClassification(
    DistilBertConfig(dim=64, n_heads=4, hidden_dim=256, n_layers=2, vocab_size=99)
)
ids = torch.randint(5, 99, (256, 16))
labels = (ids == 7).any(1).long()  # does token 7 occur?

pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.4, warm_steps=40, ramp_steps=20))
optimizer = torch.optim.AdamW(pruner.param_groups(lr=2e-3, mask_lr=5e-2))
model.train()
for step in range(120):
    if step == 80:  # the stage boundary: masks become final, the learning rate drops
        kept = pruner.finalize()
        pruner.shrink(optimizer)
        print(f"kept {kept['by_kind']}, removed {kept['sparsity']:.4f}")
        for group in optimizer.param_groups:
            group["lr"] *= 0.2
    rows = torch.randint(0, len(ids), (32,))
    loss = model(input_ids=ids[rows], labels=labels[rows]).loss + pruner.penalty()
    loss.backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()

model.eval()
small = pk.compact(model)
with torch.no_grad():
    before, after = model(input_ids=ids).logits, small(input_ids=ids).logits
print(f"loss {loss.item():.3f}; largest difference of logits {(before - after).abs().max():.1e}")
with tempfile.TemporaryDirectory() as folder:
    pk.save(small, f"{folder}/small")
    again = pk.load(f"{folder}/small")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, after)
print(f"{sum(p.numel() for p in small.parameters()):,} parameters saved and loaded")
