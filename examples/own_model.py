"""Prune models that no library knows: a plain MLP, and an encoder with attention of one's own.

A class is registered once, with the names of its linears. Both models are tiny and learn something simple, so that this
runs in seconds; put yours in their place.
"""

import tempfile

import torch
from torch import nn
from torch.nn import functional as F

import prunekern as pk

torch.manual_seed(0)


# --8<-- [start:mlp]
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(20, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.out(F.relu(self.fc2(F.gelu(self.fc1(x)))))


pk.families.register(MLP, [pk.families.mlp_group("fc1", "fc2"), pk.families.mlp_group("fc2", "out")])
pk.families.check(MLP(), torch.randn(4, 20))  # an error where these are not the channels that fall together
# --8<-- [end:mlp]


# --8<-- [start:encoder]
class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self, width=32, heads=4, layers=2, vocabulary=50):
        super().__init__()
        self.embed, self.classifier = nn.Embedding(vocabulary, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


pk.families.register(
    Encoder,
    [
        pk.families.attention_group("layers.{}.q", "layers.{}.k", "layers.{}.v", "layers.{}.o", heads=4),
        pk.families.residual_group("layers.{}.o"),
        pk.families.mlp_group("layers.{}.fc1", "layers.{}.fc2"),
        pk.families.residual_group("layers.{}.fc2"),
    ],
    head=["classifier"],  # trained, too; all else that is not named above stays as it is
)
pk.families.check(Encoder(), torch.randint(50, (2, 6)))
# --8<-- [end:encoder]


# --8<-- [start:train]
def prune(model, inputs, labels):
    pruner = pk.attach(model, pk.PruneConfig(rank=4, sparsity=0.4, warm_steps=40, ramp_steps=20))
    optimizer = torch.optim.AdamW(pruner.param_groups(lr=5e-3, mask_lr=5e-2))
    model.train()
    for step in range(120):
        if step == 80:  # the stage boundary
            pruner.finalize()
            pruner.shrink(optimizer)
        rows = torch.randint(len(inputs), (32,))
        loss = F.cross_entropy(model(inputs[rows]), labels[rows]) + pruner.penalty()
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return pk.compact(model.eval())


# --8<-- [end:train]


numbers, words = torch.randn(256, 20), torch.randint(50, (256, 12))
tasks = {MLP: (numbers, numbers[:, :10].argmax(1)), Encoder: (words, (words == 7).any(1).long())}
for cls, (inputs, labels) in tasks.items():
    model = cls()
    small = prune(model, inputs, labels)
    plan = pk.plan(small)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        difference = (small(inputs) - model(inputs)).abs().max()
        assert difference < 1e-4
        # --8<-- [start:load]
        pk.save(small, f"{folder}/small")
        again = pk.load(f"{folder}/small", into=cls())  # no config says how to make it
        # --8<-- [end:load]
        assert torch.equal(again(inputs), small(inputs))
    print(f"{cls.__name__}: {plan.macs():,} of {plan.dense_macs():,} multiply-adds a token, outputs equal")
