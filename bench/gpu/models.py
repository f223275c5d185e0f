"""What bench.gpu.everything times of whole models: dense on stock transformers against compact, at paper's shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

from bench.common.shapes import dense_model, ragged
from bench.common.sliced import masked
from bench.gpu.timing import median_seconds

# Ali et al., ASP-DAC 2025: size removed and time saved, means over their tasks, %.
PAPER = {"DistilBERT-base": (0.1738, 13.1), "RoBERTa-base": (0.2463, 17.9)}
PAPER_LLAMA = (0.2443, 18.2)
SHAPES = ((1, 128), (8, 128), (64, 128))
LLAMA = "LLaMA-7B, 4 of 32 blocks"


def models(device: torch.device, rehearsal: bool = False) -> list[Callable[[], list[dict]]]:
    """One row for each encoder (without its head) and shape, bf16. Weights are random: they do not matter for speed."""
    names = list(PAPER)[: 1 if rehearsal else None]
    return [partial(_encoder, device, name, rehearsal) for name in names]


@torch.no_grad()
def _encoder(device: torch.device, name: str, rehearsal: bool) -> list[dict]:
    rows, (share, paper_saved) = [], PAPER[name]
    dense = dense_model(name)
    # Multiples of 16: rows of 16-bit weights then begin where a GPU can read 16 bytes at once.
    small, plan = ragged(dense, share, align=16)
    dense, small, exact = (m.base_model for m in (dense, small, masked(dense, plan).to(device)))
    dtype = torch.float32 if rehearsal else torch.bfloat16
    dense, small = (m.to(device, dtype) for m in (dense, small))
    ideal = plan.dense_macs() / plan.macs()
    for batch, tokens in SHAPES[: 1 if rehearsal else None]:
        # No attention mask: a graph cannot look into one that forbids nothing, and would take the slower attention.
        ids = torch.randint(5, 30000, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
        want = exact(ids).last_hidden_state
        calls = {who: lambda m=m, i=ids: m(i).last_hidden_state for who, m in (("dense", dense), ("compact", small))}
        bound = 1e-4 if rehearsal else 3e-2
        rows.append(row(name, f"{batch} x {tokens}", calls, want, bound, device, plan, ideal, paper_saved))
    return rows


def row(name: str, shape: str, calls: dict, want, bound: float, device, plan, ideal: float, paper_saved: float) -> dict:
    """One race of "dense" against "compact", whose answer must be near `want`."""

    def check(who: str, got: torch.Tensor) -> None:
        error = ((got.double() - want).norm() / want.norm()).item()
        if got.shape != want.shape or (who == "compact" and not error <= bound):
            raise SystemExit(f"{name}, {shape}: the {who} model is off by {error:.1e}")

    seconds = median_seconds({who: [call] for who, call in calls.items()}, device, 0.4, check=check)
    ratio = seconds["dense"] / seconds["compact"]
    return {
        "model": name,
        "batch x tokens": shape,
        "removed_%": round(100 * plan.sparsity("params"), 2),
        "dense_ms": round(1e3 * seconds["dense"], 3),
        "compact_ms": round(1e3 * seconds["compact"], 3),
        "faster": round(ratio, 3),
        "of_ideal": round(ratio / ideal, 3),
        "saved_%": round(100 * (1 - 1 / ratio), 1),
        "paper_saved_%": paper_saved,
    }


class _Held(DynamicCache):
    """A cache that shows each new token to its own step only: every call of a race, and every replay of its graph,
    decodes the same position.
    """

    def update(self, key, value, layer_idx, *args, **kwargs):
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key], -2), torch.cat([layer.values, value], -2)


def decoders(device: torch.device, rehearsal: bool = False) -> list[Callable[[], list[dict]]]:
    """See `_decoders`: one case, as its shapes share the models."""
    return [partial(_decoders, device, rehearsal)]


@torch.no_grad()
def _decoders(device: torch.device, rehearsal: bool) -> list[dict]:
    """Prefill and decoding of a slice of LLaMA-7B, bf16, random weights; embeddings are shared and not timed."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4}
    if rehearsal:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    dense = LlamaModel._from_config(LlamaConfig(vocab_size=1000, **sizes), attn_implementation="sdpa")
    dense = dense.eval().requires_grad_(False)
    small, plan = ragged(dense, PAPER_LLAMA[0], align=16 if not rehearsal else 1)
    ideal, dtype = plan.dense_macs() / plan.macs(), torch.float32 if rehearsal else torch.bfloat16
    exact = masked(dense, plan).to(device)
    dense, small = (m.to(device, dtype) for m in (dense, small))
    rows = []
    for batch, tokens in ((1, 8),) if rehearsal else ((1, 512), (1, 2048), (8, 512)):
        ids = torch.randint(5, 999, (batch, tokens + 1), generator=torch.Generator().manual_seed(1)).to(device)
        want = exact(ids, use_cache=False).last_hidden_state
        prefill, decode = {}, {}
        for who, model in (("dense", dense), ("compact", small)):
            cache = DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=cache)
            cache.__class__ = _Held
            position = torch.tensor([[tokens]], device=device)
            prefill[who] = partial(_prefill, model, ids[:, :-1])
            decode[who] = partial(_decode, model, ids[:, -1:], cache, position)
        rest = (1e-4 if rehearsal else 3e-2, device, plan, ideal, PAPER_LLAMA[1])
        rows.append(row(LLAMA, f"{batch} x {tokens}, prefill", prefill, want[:, :-1], *rest))
        rows.append(row(LLAMA, f"{batch} x 1 after {tokens}", decode, want[:, -1:], *rest))
    return rows


def _prefill(model, ids: torch.Tensor) -> torch.Tensor:
    # Into a cache, as generation does: without one, transformers looks for sequences packed into a row.
    return model(ids, past_key_values=DynamicCache(config=model.config)).last_hidden_state


def _decode(model, ids: torch.Tensor, cache: DynamicCache, position: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache, position_ids=position).last_hidden_state
