"""What people put around a model: taken off where that is right, refused with what to pass where it is not."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prunekern as pk
from prunekern.families.wrapped import unwrapped
from tests.helpers.tiny_models import attached, build

# PyTorch #101107: torch.compile puts "_orig_mod." before every name, and what is saved does not load.
COMPILE = {"backend": "eager"}


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A process group of one: DistributedDataParallel asks for it."""
    file = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_taken_out_of_wrappers_of_torch():
    model = build()
    for wrapped in (
        torch.compile(model, **COMPILE),
        nn.parallel.DistributedDataParallel(model),
        nn.DataParallel(model),
        torch.compile(nn.parallel.DistributedDataParallel(model), **COMPILE),
        nn.parallel.DistributedDataParallel(torch.compile(model, **COMPILE)),
        model,
    ):
        assert unwrapped(wrapped, "compact") is model
    strange = nn.Linear(3, 3)
    assert unwrapped(strange, "compact") is strange  # families.of says what it is not


def test_attach_takes_the_model_out_of_torch_compile():
    model = build()
    pruner = pk.attach(torch.compile(model, **COMPILE), pk.PruneConfig(rank=4, sparsity=0.1))
    assert pruner.model is model
    assert not any("_orig_mod" in name for name in (*pruner.layers, *pruner.masks, *pk.plan(model).layers))


def test_a_data_parallel_wrapper_is_refused_before_attach():
    """Its reducer holds the parameters there were: those of attach would never be summed over processes."""
    for wrapped in (nn.parallel.DistributedDataParallel(build()), nn.DataParallel(build())):
        with pytest.raises(ValueError, match=r"attach: model must not be wrapped in D\w+Parallel yet .*pass model.mod"):
            pk.attach(wrapped)


def test_split_weights_are_refused():
    whole, part = build(), build()
    fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="attach: model must not be wrapped in FSDPModule .*: it splits the weights"):
        pk.attach(whole)
    fully_shard(part.distilbert.transformer.layer[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"wrapped part \(got .* at 'distilbert.transformer.layer.0'"):
        pk.attach(part)


def test_a_peft_model_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_lin"]))
    with pytest.raises(ValueError, match=r"attach: model must not be wrapped in PeftModel \(peft.peft_model.Peft"):
        pk.attach(model)


class Around(nn.Module):
    """With a config of its own name for it, as wrappers have: looks like a model of the family, and is none."""

    def __init__(self, inner):
        super().__init__()
        self.encoder, self.config = inner, inner.config


def test_a_module_around_the_model_is_refused_with_what_to_pass():
    with pytest.raises(ValueError, match="with a DistilBertForSequenceClassification at 'encoder'.*pass model.encoder"):
        pk.attach(Around(build()))
    with pytest.raises(ValueError, match="at '1.encoder'.*: pass model.1.encoder"):
        pk.attach(nn.Sequential(nn.Identity(), Around(build())))


@pytest.mark.parametrize("path", ["distilbert", "distilbert.transformer.layer.1", "classifier"])
def test_a_part_that_is_wrapped_by_itself_is_refused_by_name(path):
    for wrap in (lambda m: torch.compile(m, **COMPILE), nn.parallel.DistributedDataParallel):
        model = build()
        model.set_submodule(path, wrap(model.get_submodule(path)))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"attach: model must not have a wrapped part \(got .* at '{path}'"):
            pk.attach(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiled_in_place_keeps_its_names():
    """`Module.compile()` wraps nothing."""
    model = build()
    model.distilbert.compile(**COMPILE)
    assert unwrapped(model, "attach") is model


def test_the_trainer_names_what_to_pass(tmp_path):
    from tests.helpers.trainer_runs import Rows, arguments

    pruner = attached(build())
    with pytest.raises(ValueError, match=r"model must be the one .*got a torch.*OptimizedModule around it.*torch_comp"):
        pk.PruneTrainer(
            torch.compile(pruner.model, **COMPILE), arguments(tmp_path), pruner=pruner, train_dataset=Rows()
        )
    assert not os.listdir(tmp_path)
