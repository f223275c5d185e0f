"""Models that no library knows, registered with prunekern, and the definition that their masked forms must equal."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import prunekern as pk
from prunekern import families

ODD, HIDDEN = 13, 29


class Mlp(nn.Module):
    """A chain, odd sizes; the second layer without a bias."""

    def __init__(self, width=ODD, hidden=HIDDEN, out=3):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden + 2, bias=False)
        self.out = nn.Linear(hidden + 2, out)

    def forward(self, x):
        return self.out(torch.relu(self.fc2(F.gelu(self.fc1(x)))))


class Gated(nn.Module):
    """Two gated MLPs on a residual stream."""

    def __init__(self, width=ODD, hidden=HIDDEN, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(*s, bias=b) for n, s, b in self.parts(width, hidden)}) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def parts(width, hidden):
        return ("gate", (width, hidden), False), ("up", (width, hidden), True), ("down", (hidden, width), True)

    def forward(self, x):
        for part in self.layers:
            x = x + part["down"](F.silu(part["gate"](x)) * part["up"](x))
        return self.norm(x)


class Attention(nn.Module):
    """Heads of one width, reshaped as everybody does; values may have a width of their own."""

    def __init__(self, width, heads, kv_heads, head_dim, value_dim, rotary=False, bias=True):
        super().__init__()
        self.heads, self.kv_heads, self.rotary = heads, kv_heads, rotary
        self.q, self.k = nn.Linear(width, heads * head_dim, bias=bias), nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v, self.o = (
            nn.Linear(width, kv_heads * value_dim, bias=bias),
            nn.Linear(heads * value_dim, width, bias=bias),
        )

    def forward(self, x):
        batch, tokens, _ = x.shape

        def split(y, heads):
            return y.view(batch, tokens, heads, -1).transpose(1, 2)

        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        if self.rotary:
            q, k = (turned(y, self.rotary) for y in (q, k))
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        y = logits.softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1))


def turned(x, kind):
    """Rotary positions, of halves or of neighbours."""
    d = x.shape[-1]
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * 0.7 ** torch.arange(d // 2, dtype=x.dtype)
    cos, sin = angle.cos(), angle.sin()
    if kind == "interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, width, bias, **attention):
        super().__init__()
        self.attention = Attention(width, bias=bias, **attention)
        self.fc1, self.fc2 = nn.Linear(width, HIDDEN, bias=bias), nn.Linear(HIDDEN, width, bias=bias)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.fc2(F.gelu(self.fc1(self.norms[1](x))))


class Encoder(nn.Module):
    """Pre-norm encoder of tokens with a classifier: all kinds of groups, and a head."""

    attention = {"heads": 3, "kv_heads": 3, "head_dim": 5, "value_dim": 5}
    bias = True

    def __init__(self, width=15, layers=2, vocabulary=37, labels=3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, self.bias, **self.attention) for _ in range(layers))
        self.classifier = nn.Linear(width, labels)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(1))


class GroupedEncoder(Encoder):
    """Grouped queries, rotary halves, values narrower than keys, no biases."""

    attention = {"heads": 4, "kv_heads": 2, "head_dim": 6, "value_dim": 3, "rotary": True}
    bias = False


class InterleavedEncoder(Encoder):
    attention = {"heads": 3, "kv_heads": 1, "head_dim": 4, "value_dim": 5, "rotary": "interleaved"}


class StockLayers(nn.Module):
    """PyTorch's own encoder layers, whose FFN is of linears: in eval mode they go past these."""

    def __init__(self, width=16):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, HIDDEN, activation="gelu", batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.encoder(x, src_key_padding_mask=padding)


def encoder_groups(**attention):
    options = {name: attention[name] for name in ("heads", "kv_heads", "rotary") if name in attention}
    at = "blocks.{}.attention."
    return [
        families.attention_group(at + "q", at + "k", at + "v", at + "o", **options),
        families.mlp_group("blocks.{}.fc1", "blocks.{}.fc2"),
        families.residual_group(at + "o"),
        families.residual_group("blocks.{}.fc2"),
    ]


families.register(Mlp, [families.mlp_group("fc1", "fc2"), families.mlp_group("fc2", "out")])
families.register(
    Gated,
    lambda model: [
        group
        for i in range(len(model.layers))
        for group in (
            families.mlp_group(f"layers.{i}.up", f"layers.{i}.down", gate=f"layers.{i}.gate", full_width=i == 1),
            families.residual_group(f"layers.{i}.down"),
        )
    ],
)
for encoder in (Encoder, GroupedEncoder, InterleavedEncoder):
    families.register(encoder, encoder_groups(**encoder.attention), head=["classifier"])
families.register(
    StockLayers,
    [
        families.mlp_group("encoder.layers.{}.linear1", "encoder.layers.{}.linear2"),
        families.residual_group("encoder.layers.{}.linear2"),
    ],
)
CLASSES = (Mlp, Gated, Encoder, GroupedEncoder, InterleavedEncoder, StockLayers)


def inputs(model, batch=3, tokens=7, dtype=torch.float32, seed=0):
    """What the model is called with."""
    g = torch.Generator().manual_seed(seed)
    if isinstance(model, Encoder):
        return torch.randint(0, 37, (batch, tokens), generator=g)
    width = 16 if isinstance(model, StockLayers) else ODD
    return torch.randn(batch, tokens, width, generator=g, dtype=torch.float64).to(dtype)


def build(cls, dtype=torch.float32, seed=0, **options):
    """In eval mode, all its numbers random; its groups tried out."""
    torch.manual_seed(seed)
    model = cls(**options).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.randn(p.shape) * 0.3 + name.endswith("weight"))
            elif p.dim() == 1:
                p.copy_(torch.randn(p.shape) / 2)
    if not families.of(model).is_checked:
        families.check(model, inputs(model, dtype=dtype))
    return model


def attached(model, seed=0, **options):
    """`pk.attach` with adapters as after training: B and magnitudes random."""
    pruner = pk.attach(model, pk.PruneConfig(**{"rank": 2, "sparsity": 0.1, "seed": seed, "warm_steps": 0} | options))
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for layer in pruner.layers.values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=g) / layer.in_features**0.5)
            layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=g))
            layer.refresh()
    return pruner


def prune(pruner, share, seed=0):
    """About `share` of each mask's groups below the threshold; 0 and 1 exactly."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for mask in pruner.masks.values():
            on = torch.as_tensor(rng.random(mask.logits.numel()) >= share)
            mask.logits.copy_(torch.where(on, 1.0, -1.0))
    return pruner


def merged(masked, dense):
    """`dense`, of the same class, in float64, with each adapted linear by the definition:
    W = m_b m (V + s B A) / ||V + s B A||, and m_b b. Rows of a mask's groups are found by reshaping, not by the table.
    """
    dense = dense.double().eval()
    for name, module in dense.named_modules():
        layer = masked.get_submodule(name)
        if isinstance(layer, pk.nn.MaskedDoRALinear):
            V, A, B, m = (t.detach().double() for t in (layer.weight, layer.A, layer.B, layer.magnitude))
            W = V + layer.scale * B @ A
            W = m[:, None] * W / W.norm(dim=1, keepdim=True)
            on = row_mask(masked, name, layer)
            module.weight.data.copy_(W * on[:, None])
            if layer.bias is not None:
                module.bias.data.copy_(layer.bias.detach().double() * on)
        else:
            for leaf, value in module.named_parameters(recurse=False):
                value.data.copy_(layer.get_parameter(leaf).detach().double())
    return dense


def row_mask(masked, name, layer):
    """m_b [N] of a layer."""
    if layer.mask is None:
        return torch.ones(layer.out_features, dtype=torch.float64)
    on = (layer.mask.logits > layer.mask.threshold).double()
    if on.numel() == layer.out_features:
        return on
    attention = masked.get_submodule(name.rpartition(".")[0])  # of the queries of grouped heads, or rotary pairs
    on = on.view(attention.kv_heads, 1, -1)
    if attention.rotary:
        on = on.repeat_interleave(2, -1) if attention.rotary == "interleaved" else torch.cat([on, on], -1)
    return on.expand(-1, attention.heads // attention.kv_heads, -1).flatten()


def difference(got, want):
    """max |difference| relative to max |value|; infinite where one is not finite."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    if not (torch.isfinite(got).all() and torch.isfinite(want).all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max())
