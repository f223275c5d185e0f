"""Training in 16 bits: under bf16 autocast, and of a model that comes in bf16 itself."""

import copy
import importlib

import pytest
import torch

import prunekern as pk
from prunekern.families.wrapped import take_off_mixed_precision
from prunekern.machine.bf16_trap import bf16_matmul_crashes
from prunekern.nn import MaskedDoRALinear
from tests.helpers.tiny_decoders import FAMILIES as DECODERS
from tests.helpers.tiny_decoders import build as build_decoder
from tests.helpers.tiny_models import FAMILIES, attached, batch, build, difference, logits
from tests.helpers.trainer_runs import STEPS, Each, Stop, fresh, result, same, stop_at

op = importlib.import_module("prunekern.ops.dora_linear")  # the name in prunekern.ops is the function

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(bf16_matmul_crashes(), reason="needs a CPU whose AMX oneDNN can use, or none")


def signal_to_noise(got, want):
    """In dB."""
    return float(10 * torch.log10(want.double().square().sum() / (got.double() - want.double()).square().sum()))


def masked_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedDoRALinear)}


def dtypes(model):
    """Of the last part of each parameter's name."""
    found = {}
    for name, parameter in model.named_parameters():
        found.setdefault(name.rpartition(".")[2], set()).add(parameter.dtype)
    return found


# -- autocast ----------------------------------------------------------------------------------------------------


def test_trainer_reaches_every_layer_in_both_stages(tmp_path):
    trainer = fresh(tmp_path, save_strategy="no", bf16=True)
    seen, shrunk = {}, {}
    for name, layer in trainer.pruner.layers.items():
        layer.register_forward_hook(
            lambda m, x, y, n=name: seen.setdefault(n, []).append((y.dtype, m.gain(None).dtype))
        )
    trainer.add_callback(Each(lambda step: shrunk.setdefault(trainer.pruner.shrunk, step)))
    trainer.train()
    assert set(shrunk) == {False, True}
    for calls in seen.values():
        assert len(calls) == STEPS and set(calls) == {(torch.bfloat16, torch.float32)}
    assert len(seen) == 12
    assert {d for found in dtypes(trainer.model).values() for d in found} == {torch.float32}
    assert 0.4 <= trainer.report["sparsity"] < 0.43


def test_a_compact_model_is_not_under_the_autocast_of_its_training(tmp_path):
    trainer = fresh(tmp_path, save_strategy="no", bf16=True)
    trainer.train()
    model = trainer.model.eval()
    in_16_bits = logits(model, batch())  # accelerate leaves its forward pass so
    small = pk.compact(model)
    take_off_mixed_precision(model)
    want = logits(model, batch())
    assert difference(in_16_bits, want) > 1e-4 >= difference(logits(small, batch()), want)
    for each in (small, model):
        assert not {"forward", "_original_forward"} & set(each.__dict__)
    take_off_mixed_precision(small)  # nothing left to take off
    assert torch.equal(logits(small, batch()), logits(pk.compact(model), batch()))


def test_a_forward_of_somebody_elses_stays():
    model, calls = build(), []
    own = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    patched = model.forward
    model._original_forward, model.forward = patched, lambda *args, **kwargs: None
    take_off_mixed_precision(model)
    assert model.forward is patched and logits(model, batch()) is not None and calls


def test_a_run_stopped_and_resumed_ends_the_same(tmp_path):
    whole = fresh(tmp_path / "whole", bf16=True)
    whole.train()
    with pytest.raises(Stop):
        fresh(tmp_path / "parts", [stop_at(5)], bf16=True).train()
    again = fresh(tmp_path / "parts", bf16=True)
    again.train(resume_from_checkpoint=True)
    same(result(whole), result(again))


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("stage", ["masks open", "masks drawn", "shrunk"])
def test_gradients_are_those_of_fp32_to_16_bits(stage, in_bf16, monkeypatch):
    """A rounding to bf16 is an error of 2^-9 at most, evenly spread -60 dB. On its way through two blocks and back a
    gradient passes six linears twice, softmax and norms with them: some hundred roundings, -40 dB. Softmax and
    LayerNorm may double what comes to them: 36 dB. A term left out would show at 20.
    """
    monkeypatch.setattr(op, "multiplies_bf16", lambda: in_bf16)
    model = build().train()
    pruner = attached(model, sparsity=0.3, warm_steps=5 if stage == "masks open" else 0)
    if stage == "shrunk":
        pruner.finalize()
        pruner.shrink()
    found = {}
    for autocast in (False, True):
        twin = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = twin(**batch(16), labels=torch.arange(16) % 3).loss
        loss.backward()
        by_kind = {}
        for name, p in twin.named_parameters():
            if p.grad is not None:
                assert p.grad.dtype == torch.float32
                by_kind.setdefault(name.rpartition(".")[2], []).append(p.grad.flatten())
        found[autocast] = {kind: torch.cat(grads) for kind, grads in by_kind.items()}
    kinds = {"A", "B", "magnitude", "weight", "bias"} | ({"logits"} if stage != "shrunk" else set())
    assert set(found[True]) == set(found[False]) == kinds
    for kind in kinds:
        assert signal_to_noise(found[True][kind], found[False][kind]) >= 36, kind


# -- a model in bf16 -----------------------------------------------------------------------------------------------

WIDE = {"A", "B", "magnitude", "logits"}


def stays_narrow(model):
    found = dtypes(model)
    assert all(kind in WIDE for kind, kinds in found.items() if torch.float32 in kinds), found
    assert all(found[kind] == {torch.float32} for kind in WIDE & set(found)), found
    assert found["weight"] == {torch.bfloat16}


@pytest.mark.parametrize("in_bf16", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_weights_stay_in_bf16_all_the_way(autocast, in_bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "multiplies_bf16", lambda: in_bf16)
    trainer = fresh(tmp_path, save_strategy="no", model_options={"dtype": torch.bfloat16}, bf16=autocast)
    model = trainer.model
    stays_narrow(model)
    frozen = {name: (layer.weight.data_ptr(), layer.weight.clone()) for name, layer in masked_layers(model).items()}

    def unchanged(step):
        stays_narrow(model)
        for name, layer in masked_layers(model).items():
            if not trainer.pruner.shrunk:  # the same memory, too: no copy in its place
                assert layer.weight.data_ptr() == frozen[name][0] and torch.equal(layer.weight, frozen[name][1])
            assert layer._narrow is None

    trainer.add_callback(Each(unchanged))
    trainer.train()
    assert trainer.pruner.finalized and trainer.pruner.shrunk
    small = pk.compact(model)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    # Merging rounds each weight once more, an answer has some twenty roundings in either model.
    assert difference(logits(small, batch()).float(), logits(model.eval(), batch()).float()) <= 20 * 2**-8
    pk.save(small, tmp_path / "small")
    pk.save_adapter(trainer.pruner, tmp_path / "adapter")
    assert pk.load(tmp_path / "small", weights="bf16").num_parameters() == small.num_parameters()
    again = build(dtype=torch.bfloat16)
    pk.load_adapter(again, tmp_path / "adapter")
    stays_narrow(again)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_family_in_bf16(family):
    model = build(family, dtype=torch.bfloat16).train()
    trains_in_16_bits(model, {**batch(), "labels": torch.arange(4) % 3})


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_in_bf16(family):
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    trains_in_16_bits(build_decoder(family, dtype=torch.bfloat16).train(), {"input_ids": ids, "labels": ids})


def trains_in_16_bits(model, inputs):
    pruner = attached(model, sparsity=0.2)
    optimizer = torch.optim.AdamW(pruner.param_groups(1e-3, 1e-2))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss + pruner.penalty()
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        stays_narrow(model)
    assert torch.isfinite(loss)
    pruner.finalize()
    assert {p.dtype for p in pk.compact(model).parameters()} == {torch.bfloat16}
