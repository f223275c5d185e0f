"""Models with PEFT's adapters, as after training."""

import pytest
import torch

import prunekern as pk
from tests.helpers import tiny_decoders, tiny_models

peft = pytest.importorskip("peft")

FAMILIES = ("distilbert", "bert", "roberta", "llama")
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
SUFFIXES = {  # q, v and the last layer of the FFN
    "distilbert": ["q_lin", "v_lin", "lin2"],
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
HEAD = {"distilbert": ["pre_classifier", "classifier"], "bert": ["classifier"], "roberta": ["classifier"]}


def build(family="distilbert", task="sequence", **options):
    return (tiny_decoders if family == "llama" else tiny_models).build(family, task, **options)


def batch(family="distilbert"):
    return (tiny_decoders if family == "llama" else tiny_models).batch()


def with_adapter(dense, targets=("q_lin", "v_lin", "lin2"), dora=True, head=("classifier",), seed=7, **options):
    """A PEFT model in eval mode, its adapter and saved modules as after training."""
    options = {"r": 3, "lora_alpha": 5, "modules_to_save": list(head) or None} | options
    config = peft.LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets), use_dora=dora, **options
    )
    model = peft.get_peft_model(dense, config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g).to(p)
            if name.endswith("lora_B.default.weight"):
                p.copy_(0.5 * noise / p.shape[1] ** 0.5)
            elif "lora_magnitude" in name:
                p.mul_(1 + 0.3 * noise)
            elif "modules_to_save" in name:
                p.add_(0.3 * noise)
    return model


def distilbert(**options):
    return with_adapter(build(), **options)


def no_pruning(**options):
    return pk.PruneConfig(**{"sparsity": 0.0} | options)


def lora_layers(model):
    named = model.base_model.model.named_modules()
    return {n: m for n, m in named if isinstance(m, peft.tuners.lora.LoraLayer)}


PATTERNS = {"rank_pattern": {"layer.1.attention.q_lin": 6, "lin2": 2}, "alpha_pattern": {"v_lin": 11}}
