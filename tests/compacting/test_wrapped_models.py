"""Models inside torch.compile, data parallel wrappers, PEFT and other modules: names on disk are those of the model."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

import prunekern as pk
from prunekern.compacting.card import model_card
from prunekern.compacting.checkpoint import set_weights
from tests.helpers import tiny_decoders
from tests.helpers.tiny_models import attached, batch, build, logits, prune

WRAPPERS = ("compile", "ddp", "dp", "both")


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A process group of one: DistributedDataParallel asks for it."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def wrapped(model, how):
    if how in ("ddp", "both"):
        model.requires_grad_(True)  # of a compact model nothing is trained, which the wrapper refuses
        model = nn.parallel.DistributedDataParallel(model)
    if how == "dp":
        model = nn.DataParallel(model)
    return torch.compile(model, backend="eager") if how in ("compile", "both") else model


def masked(**options):
    model = build()
    prune(attached(model, **options), 0.5)
    return model


def tensor_names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("how", WRAPPERS)
def test_wrapped_after_attach(how, tmp_path):
    """PyTorch #101107: "_orig_mod." before every name."""
    model = masked()
    plan, want = pk.plan(model), logits(pk.compact(model), batch())
    outer = wrapped(model, how)
    assert pk.plan(outer) == plan and set(pk.plan(outer).layers) == set(plan.layers)
    small = pk.compact(outer)
    assert type(small) is type(model) and torch.equal(logits(small, batch()), want)
    pk.save(small, tmp_path / "m")
    assert torch.equal(logits(pk.load(tmp_path / "m"), batch()), want)


@pytest.mark.parametrize("how", WRAPPERS)
def test_compact_and_then_wrapped(how, tmp_path):
    small = pk.compact(masked())
    want, names, plan = logits(small, batch()), set(small.state_dict()), pk.plan(small)
    outer = wrapped(small, how)
    assert pk.plan(outer) == plan
    pk.save(outer, tmp_path / "m")
    assert tensor_names(tmp_path / "m") == names
    assert torch.equal(logits(pk.load(tmp_path / "m"), batch()), want)
    assert "# DistilBertForSequenceClassification, compact" in model_card(outer)
    assert type(pk.plain_twin(outer)) is type(small)
    with pytest.raises(ValueError, match="compact: DistilBertForSequenceClassification is compact already"):
        pk.compact(outer)


def test_stock_checkpoints_and_weights_of_wrapped_models(tmp_path):
    model = build()
    pruner = attached(model, sparsity=0.3)
    pruner.finalize("stock")
    pk.save_stock(torch.compile(model, backend="eager"), tmp_path / "stock")
    assert not any("_orig_mod" in name for name in tensor_names(tmp_path / "stock"))
    assert type(model).from_pretrained(tmp_path / "stock").config.n_heads <= model.config.n_heads
    causal = tiny_decoders.build()
    prune(attached(causal), 0.5)
    small = pk.compact(causal)
    outer = torch.compile(small, backend="eager")
    assert set_weights(outer, "int8") is outer and small.lm_head.weights == "int8"


def test_adapters_of_a_model_compiled_after_attach(tmp_path):
    model = build()
    pruner = attached(model)
    pruner.model = torch.compile(model, backend="eager")
    pk.save_adapter(pruner, tmp_path / "a")
    with safe_open(tmp_path / "a" / "adapter.safetensors", "pt") as file:
        assert not any("_orig_mod" in name for name in file.keys())
    back = pk.load_adapter(torch.compile(build(), backend="eager"), tmp_path / "a")
    assert torch.equal(logits(back.model, batch()), logits(model, batch()))
    with pytest.raises(ValueError, match="load_adapter: model must not be wrapped in DistributedDataParallel yet"):
        pk.load_adapter(nn.parallel.DistributedDataParallel(build()), tmp_path / "a")


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.encoder, self.config = inner, inner.config


@pytest.mark.parametrize("call", ["plan", "compact", "save", "save_stock", "plain_twin", "export_onnx"])
def test_other_wrappers_are_refused_at_once(call, tmp_path):
    peft = pytest.importorskip("peft")
    arguments = (tmp_path / "m",) if call.startswith(("save", "export")) else ()
    run = getattr(pk, call)
    small = pk.compact(masked())
    cases = [(Around(small), r"must be the transformers model itself .* at 'encoder'\): pass model.encoder")]
    cases += [(nn.Sequential(small), r".* at '0'\): pass model.0")]
    part = pk.compact(masked())
    part.classifier = torch.compile(part.classifier, backend="eager")
    cases += [(part, r"must not have a wrapped part .*'classifier'")]
    adapted = peft.get_peft_model(pk.compact(masked()), peft.LoraConfig(target_modules=["classifier"]))
    cases += [(adapted, r"must not be wrapped in PeftModel .*merge_and_unload")]
    for model, message in cases:
        with pytest.raises(ValueError, match=f"{call}: model {message}"):
            run(model, *arguments)
    assert not (tmp_path / "m").exists()


def test_compiled_in_place_is_a_model_like_any_other(tmp_path):
    """`Module.compile()` wraps nothing, and a copy is not compiled."""
    model = masked()
    want = logits(pk.compact(model), batch())
    model.compile(backend="eager")
    small = pk.compact(model)
    small.compile(backend="eager")
    pk.save(small, tmp_path / "m")
    assert torch.equal(logits(pk.load(tmp_path / "m"), batch()), want)
