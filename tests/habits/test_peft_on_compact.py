"""PEFT on top of a compact model: adapters that train are right, and merge; the rest is refused, by PEFT or by us.

Lines of docs/guides/other-libraries.md.
"""

from __future__ import annotations

import copy

import pytest
import torch

import prunekern as pk
from tests.habits.test_hooks import compact
from tests.habits.test_other_libraries import close, layers
from tests.helpers import tiny_models

peft = pytest.importorskip("peft")

PROJECTIONS = {
    "distilbert": ("q_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "bert": ("self.query", "self.value", "attention.output.dense", "intermediate.dense", "1.output.dense"),
    "llama": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def adapted(small, config, seed=1):
    """PEFT's model in eval mode, all that trains away from its start."""
    model, g = peft.get_peft_model(small, config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    return model


def trains(model, inputs, what):
    """Whether every trainable parameter whose name holds `what` gets a gradient, and there are some."""
    model(**inputs)[0].square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if p.requires_grad and what in n]
    return bool(grads) and all(g is not None and bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_low_rank_adapters_on_the_weights_of_compact_layers(family):
    """`target_parameters` adds to the weight, of kept rows and columns; on activations that are fused, too."""
    for part in PROJECTIONS[family]:
        original, inputs = compact(family)
        small = copy.deepcopy(original)
        before, weights = small(**inputs)[0], [f"{n}.weight" for n in layers(small) if n.endswith(part)]
        config = peft.LoraConfig(target_modules=[], target_parameters=weights)
        close(peft.get_peft_model(copy.deepcopy(small), config).eval()(**inputs)[0], before)
        model = adapted(small, config)
        assert trains(model, inputs, "lora")
        got = model(**inputs)[0].detach()
        assert (got - before).abs().max() > 1e-3
        want, added = original, 0
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_A") and name:
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                want.get_submodule(name).weight.data += module.scaling["default"] * B @ A
                added += 1
        assert added == len(weights)
        close(got, want(**inputs)[0])
        merged = model.merge_and_unload()
        close(merged(**inputs)[0], got)
        assert type(merged) is type(want) and pk.plan(merged) == pk.plan(want)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_adapters_on_compact_layers_as_modules_are_refused_by_peft(family):
    """It knows `nn.Linear`; a compact layer is none, since its activation and places are fused."""
    for part in PROJECTIONS[family]:
        targets = [n for n in layers(compact(family)[0]) if n.endswith(part)]
        for cls in (peft.LoraConfig, peft.LoHaConfig, peft.HRAConfig, peft.MissConfig, peft.FourierFTConfig):
            with pytest.raises((ValueError, TypeError), match="CompactLinear"):
                peft.get_peft_model(compact(family)[0], cls(target_modules=targets))


def test_all_linear_takes_what_is_outside_the_blocks():
    small, inputs = compact("bert")
    model = adapted(small, peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    found = [n for n, m in model.named_modules() if hasattr(m, "base_layer")]
    assert found == ["base_model.model.bert.pooler.dense"]
    got = model(**inputs)[0]
    close(got, model.merge_and_unload()(**inputs)[0])
    with pytest.raises(ValueError, match="target"):  # a decoder has its head there only, which PEFT leaves out
        peft.get_peft_model(compact("llama")[0], peft.LoraConfig(target_modules="all-linear"))


def test_adapters_outside_the_blocks():
    """The head and embeddings of a compact model are those of any other; `modules_to_save` takes compact layers."""
    cases = [("llama", {"target_modules": ["lm_head"]}), ("llama", {"target_modules": ["embed_tokens"]})]
    cases += [("bert", {"target_modules": ["word_embeddings"], "modules_to_save": ["intermediate.dense"]})]
    cases += [("llama", {"target_modules": ["lm_head"], "modules_to_save": ["gate_proj", "q_proj"]})]
    for family, options in cases:
        small, inputs = compact(family)
        before = small(**inputs)[0]
        model = adapted(small, peft.LoraConfig(**options))
        assert trains(model, inputs, "modules_to_save" if "modules_to_save" in options else "lora")
        got = model(**inputs)[0]
        assert (got - before).abs().max() > 1e-3
        close(got, model.merge_and_unload()(**inputs)[0])


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_prefixes_are_refused(family):
    """Keys and values of the dense model's shape: a compact one holds kept channels only."""
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    sizes = {"token_dim": 48, "num_attention_heads": 4, "num_layers": 2} if family != "llama" else {}
    model = peft.get_peft_model(
        compact(family)[0], peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task, **sizes)
    )
    ids = tiny_models.batch(padded=False)["input_ids"]
    error, message = (RuntimeError, "Sizes of tensors") if family == "llama" else (ValueError, "past_key_values must")
    for mask in ({}, {"attention_mask": torch.ones_like(ids)}):
        for training in (False, True):
            with pytest.raises(error, match=message):
                model.train(training)(input_ids=ids, **mask)
