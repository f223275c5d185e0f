"""accelerate, weight averages, quantisers and torch.multiprocessing on compact and masked models.

Lines of docs/guides/other-libraries.md: what works has its right value here, what does not its error.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prunekern.nn import CompactLinear
from tests.habits.test_hooks import compact
from tests.helpers import tiny_decoders, tiny_models

FAMILIES = ("distilbert", "bert", "llama")
KINDS = ("masked", "compact")


def model_of(kind, family):
    if kind == "compact":
        return compact(family)
    tiny = tiny_models if family in tiny_models.FAMILIES else tiny_decoders
    model = tiny.build(family)
    tiny_models.prune(tiny_models.attached(model), 0.3)
    return model.eval(), tiny.batch()


def layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, CompactLinear)]


def scaled(model, factor):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def close(got, want, tolerance=1e-4):
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


# --- accelerate -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model", "dispatch_model to disk"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_offloaded_weights(kind, family, how, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = model_of(kind, family)
    want = model(**inputs)[0]
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    elif how == "dispatch_model":
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        first, *rest = (name for name, _ in model.named_children())
        accelerate.dispatch_model(model, {first: "disk"} | dict.fromkeys(rest, "cpu"), "cpu", offload_dir=tmp_path)
        assert any(p.is_meta for p in model.parameters())
    for _ in range(2):
        close(model(**inputs)[0], want)
    if how.startswith("dispatch_model"):
        accelerate.hooks.remove_hook_from_submodules(model)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loaded_with_a_device_map(family, tmp_path):
    """Blocks on disk, too: the kept indices, which stand in no file, stay where they are used."""
    pytest.importorskip("accelerate")
    small, inputs = compact(family)
    want, cls = small(**inputs)[0], type(small)
    small.save_pretrained(tmp_path / "m")
    for options in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}):
        close(cls.from_pretrained(tmp_path / "m", **options)(**inputs)[0], want)
    places = dict.fromkeys((name for name, _ in small.named_children()), "disk")
    loaded = cls.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "offloaded")
    assert all(p.is_meta for n, p in loaded.named_parameters() if "layer" in n)
    close(loaded(**inputs)[0], want)


def test_offloaded_buffers_are_refused(tmp_path, monkeypatch):
    """accelerate takes no buffer that is None; did it, the indices would be what was in memory when it moved them."""
    accelerate = pytest.importorskip("accelerate")
    small, _ = compact("bert")
    small.save_pretrained(tmp_path / "m")
    with pytest.raises(AttributeError, match="NoneType"):
        accelerate.cpu_offload(small, execution_device="cpu", offload_buffers=True)

    def dispatch(model, *_):
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to("meta")

    monkeypatch.setattr("transformers.modeling_utils.accelerate_dispatch", dispatch)
    with pytest.raises(ValueError, match="from_pretrained: offload_buffers must be False"):
        type(small).from_pretrained(
            tmp_path / "m", device_map={"": "disk"}, offload_folder=tmp_path / "o", offload_buffers=True
        )


@pytest.mark.parametrize("family", ["distilbert", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_by_an_accelerator(kind, family):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = model_of(kind, family)
    want = model(**inputs)[0]
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    close(prepared(**inputs)[0], want)
    assert accelerator.unwrap_model(prepared) is model


# --- torch's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_averages_of_weights(kind, family):
    model, inputs = model_of(kind, family)
    model(**inputs)
    mean, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for average in (mean, ema):
        average.update_parameters(model)
        average(**inputs)  # what is cached now is of another weight than the next
        average.update_parameters(scaled(model, 0.5))
    close(mean(**inputs)[0], scaled(model, 0.75)(**inputs)[0])
    close(ema(**inputs)[0], scaled(model, 0.875)(**inputs)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_functional_call_of_a_model(kind, family):
    model, inputs = model_of(kind, family)
    before = model(**inputs)[0]
    other = {name: 0.5 * parameter for name, parameter in model.named_parameters()}
    close(functional_call(model, other, (), inputs)[0], scaled(model, 0.5)(**inputs)[0])
    assert torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("family", ["distilbert", "bert"])
def test_gradients_by_sample_of_a_model(family):
    """Without an attention mask, whose values transformers asks for, which vmap refuses on dense models, too."""
    small, inputs = compact(family)
    parameters = dict(small.requires_grad_(True).named_parameters())

    def loss(parameters, ids):
        return functional_call(small, parameters, (), {"input_ids": ids[None]})[0].square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, inputs["input_ids"])
    small(input_ids=inputs["input_ids"])[0].square().sum().backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_clipped(kind, family):
    model, inputs = model_of(kind, family)
    if kind == "compact":
        model.requires_grad_(True)
    model(**inputs)[0].square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), norm)
    close(nn.utils.get_total_norm(grads), torch.tensor(1.0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_casts(kind, family):
    """To 16 bits: within the rounding of a few dozen products; to float64 and back: nothing is lost."""
    model, inputs = model_of(kind, family)
    want = model(**inputs)[0]
    for cast, tolerance in (("half", 0.02), ("bfloat16", 0.1), ("double", 1e-5)):
        got = getattr(copy.deepcopy(model), cast)()(**inputs)[0]
        assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max()
    close(copy.deepcopy(model).double().float()(**inputs)[0], want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_quantize_dynamic_takes_heads_only(family):
    """It goes by class: compact layers are no `nn.Linear`, and stay as they are. `weights=` is for them."""
    small, inputs = compact(family)
    heads = {"distilbert": {"pre_classifier", "classifier"}, "bert": {"bert.pooler.dense", "classifier"}}
    for classes in ({nn.Linear}, {nn.Linear, CompactLinear}):
        quantized = torch.ao.quantization.quantize_dynamic(small, classes)
        changed = {n for n, m in quantized.named_modules() if type(m).__module__.startswith("torch.ao.nn.quantized")}
        assert {n for n in changed if "_packed_params" not in n} == heads.get(family, {"lm_head"})
        assert layers(quantized) == layers(small)
        assert (quantized(**inputs)[0] - small(**inputs)[0]).abs().max() < 0.05 * small(**inputs)[0].abs().max()


def test_another_quantiser_on_top_is_refused_by_transformers(tmp_path):
    from transformers import BitsAndBytesConfig

    small, _ = compact("bert")
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with PrunekernConfig but you are passing a BitsAndBytesConfig"):
        type(small).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def answer(model, inputs, answers):
    torch.set_num_threads(1)
    answers.put(model(**inputs)[0].detach().numpy())


def test_shared_with_a_process_that_is_spawned():
    small, inputs = compact("distilbert")
    want = small(**inputs)[0]
    small.share_memory()
    assert all(p.is_shared() for p in small.parameters())
    close(small(**inputs)[0], want)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=answer, args=(small, inputs, answers))
    process.start()
    got = torch.from_numpy(answers.get(timeout=120))
    process.join()
    close(got, want)
