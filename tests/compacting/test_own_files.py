"""Compact models of plain classes on disk: a plan and one file of weights, read into a dense model of the class."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunekern as pk
from prunekern import families
from prunekern.compacting.checkpoint import set_weights
from prunekern.nn import CompactLinear
from tests.helpers.own_models import (
    CLASSES,
    Encoder,
    GroupedEncoder,
    Mlp,
    attached,
    build,
    difference,
    encoder_groups,
    inputs,
    prune,
)


def small_model(cls=Encoder, dtype=torch.float32, share=0.4):
    model = build(cls, dtype)
    prune(attached(model), share)
    return pk.compact(model)


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("cls", CLASSES)
def test_saved_and_loaded(cls, dtype, tmp_path):
    small = small_model(cls, dtype)
    pk.save(small, tmp_path / "m")
    assert set(contents(tmp_path / "m")) == {"model.safetensors", "prunekern.json", "README.md"}
    with torch.device("meta"):
        hollow = cls()
    for into in (build(cls, seed=3), *([] if cls is Encoder else [hollow])):
        again = pk.load(tmp_path / "m", into=into)
        assert again is into and not again.training and not any(p.requires_grad for p in again.parameters())
        x = inputs(again, dtype=dtype)
        assert torch.equal(again(x), small(x)) and pk.plan(again) == pk.plan(small)
    pk.save(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "m")


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_few_bits(kind, tmp_path):
    small = small_model(GroupedEncoder)
    x, plain = inputs(small), small.state_dict()
    pk.save(small, tmp_path / "m", weights=kind)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in small.state_dict().items())
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert stored["embed.weight"].dtype == torch.float32  # nothing tells what reads it
    assert (
        stored["blocks.0.fc1.weight"].dtype == {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}[kind]
    )
    again = pk.load(tmp_path / "m", into=GroupedEncoder())
    want = set_weights(small, kind)(x)
    assert torch.equal(again(x), want)
    pk.save(again, tmp_path / "again")  # as it was stored
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()
    wide = pk.load(tmp_path / "m", weights="fp32", into=GroupedEncoder())
    assert {m.weights for m in wide.modules() if isinstance(m, CompactLinear)} == {"fp32"}
    if kind == "bf16":  # where x is rounded, too, which CPUs that multiply in bf16 do, that is more than the weights
        assert difference(wide(x), set_weights(small, kind, activations="float")(x)) < 1e-5
    assert difference(wide(x), want) < 5e-2
    assert torch.equal(pk.load(tmp_path / "m", weights="int8", into=GroupedEncoder())(x), set_weights(wide, "int8")(x))


def test_tied_tensors_buffers_and_other_files(tmp_path):
    """What the state dict holds twice is written once, and tied again; a folder's own files stay."""

    class Own(Mlp):
        def __init__(self, vocabulary=11):
            super().__init__()
            self.embed, self.words = nn.Embedding(vocabulary, 3), nn.Linear(3, vocabulary)
            self.words.weight = self.embed.weight
            self.register_buffer("mean", torch.zeros(13))
            self.register_buffer("angles", torch.arange(13.0), persistent=False)
            self.register_buffer("view", self.mean[2:5])

        def forward(self, x):
            return self.words(super().forward(x - self.mean) + self.embed(torch.zeros((), dtype=torch.int64)))

    model = build(Own)
    model.mean.normal_()
    prune(attached(model), 0.5)
    small = pk.compact(model)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("mine")
    (tmp_path / "m" / "config.json").write_text('{"layers": 1}')  # that says how to make the model, say
    (tmp_path / "m" / "pytorch_model.bin").write_text("of another model")
    pk.save(small, tmp_path / "m")
    assert set(contents(tmp_path / "m")) == {"model.safetensors", "prunekern.json", "README.md", "config.json"}
    assert (tmp_path / "m" / "README.md").read_text() == "mine"
    assert "words.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    again = pk.load(tmp_path / "m", into=Own())
    assert again.words.weight is again.embed.weight
    x = inputs(model)
    assert torch.equal(again(x), small(x))
    with torch.device("meta"):
        hollow = Own()
    with pytest.raises(ValueError, match="load: into must hold its buffer 'angles', which stands in no file"):
        pk.load(tmp_path / "m", into=hollow)
    untied = Own()
    untied.words.weight = nn.Parameter(torch.zeros(11, 3))
    with pytest.raises(ValueError, match="tensor 'words.weight' is missing"):
        pk.load(tmp_path / "m", into=untied)


def test_a_transformers_model_takes_the_folder_of_a_plain_one(tmp_path):
    from tests.helpers.compact_folders import small_model as distilbert

    pk.save(small_model(Mlp), tmp_path / "m")
    pk.save(distilbert(), tmp_path / "m")
    assert not (tmp_path / "m" / "prunekern.json").exists()
    pk.load(tmp_path / "m")


@pytest.fixture
def folder(tmp_path):
    pk.save(small_model(), tmp_path / "m", weights="int8")
    return tmp_path / "m"


def refused(folder, into=None, **options):
    """What load says; `into` is as it was."""
    into = Encoder() if into is None else into
    before = {name: (type(module), id(module)) for name, module in into.named_modules()}
    values = {name: tensor.clone() for name, tensor in into.state_dict().items()}
    with pytest.raises(ValueError) as error:
        pk.load(folder, into=into, **options)
    assert before == {name: (type(module), id(module)) for name, module in into.named_modules()}
    assert all(torch.equal(tensor, values[name]) for name, tensor in into.state_dict().items())
    return str(error.value)


def test_into_what(folder):
    with pytest.raises(
        ValueError, match=r"load: into must be a dense .*own_models.Encoder, as .* holds the plan of one"
    ):
        pk.load(folder)
    assert "'blocks.1.attention.k' is not in the model" in refused(folder, Encoder(layers=1))
    assert "layer 'blocks.0.attention.q' must be [15, 20]" in refused(folder, Encoder(width=20))
    assert "into must be a tests.helpers.own_models.Encoder, of a registered class (got torch.nn" in refused(
        folder, nn.ReLU()
    )
    assert "this plan is for another model" in refused(folder, Mlp())
    assert "tensor 'embed.weight' must have shape [11, 15] as into has it (got [37, 15])" in refused(
        folder, Encoder(vocabulary=11)
    )
    assert "it is attached, or compact, already" in refused(folder, small_model())
    assert "activations must be" in refused(folder, activations="int4")

    class Wider(Encoder):
        """Other heads, which no tensor tells."""

    families.register(Wider, encoder_groups(heads=5))
    assert "load: into must have 3 attention heads, as" in refused(folder, Wider())
    families.unregister(Wider)


def test_damaged_files(folder):
    said = json.loads((folder / "prunekern.json").read_text())

    def edited(**changes):
        (folder / "prunekern.json").write_text(json.dumps(said | changes))
        return refused(folder)

    assert "format 9 was written by prunekern" in edited(format=9)
    assert "plan: must be a mapping with 'format' and 'layers'" in edited(plan=None)
    assert "prunekern.json: stored: weights must be one of" in edited(stored=said["stored"] | {"weights": "int2"})
    layers = said["plan"]["layers"]
    other = layers | {"blocks.0.fc1": layers["blocks.0.fc1"] | {"rows": "all"}}
    assert "cols of layer 'blocks.0.fc2' do not match" in edited(plan=said["plan"] | {"layers": other})
    assert "tensor 'blocks.0.attention.q.weight' must be F64, F32, BF16, F16 (got I8)" in edited(stored=None)
    assert "must have shape [10, 16] by the plan" in edited(stored=said["stored"] | {"weights": "int4"})
    assert "must be F32 by prunekern.json" in edited(stored=said["stored"] | {"weights": "fp32"})
    edited(format="1")
    (folder / "prunekern.json").write_text("{")
    assert "is not valid JSON" in refused(folder)
    (folder / "prunekern.json").write_text(json.dumps(said))
    file = folder / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)

    def stored(**changes):
        save_file({n: t for n, t in (tensors | changes).items() if t is not None}, file)
        return refused(folder)

    names = {
        "w": "blocks.0.fc1.weight",
        "s": "blocks.0.fc1.scale",
        "b": "blocks.0.fc1.bias",
        "n": "blocks.0.norms.0.weight",
    }
    assert "tensor 'blocks.0.fc1.weight' is missing" in stored(**{names["w"]: None})
    assert "tensor 'blocks.0.fc1.bias' is missing" in stored(**{names["b"]: None})
    assert "tensor 'blocks.0.norms.0.weight' is missing" in stored(**{names["n"]: None})
    assert "tensor 'blocks.0.fc1.weight' must have shape" in stored(**{names["w"]: tensors[names["w"]][1:]})
    assert "must be I8 by" in stored(**{names["w"]: tensors[names["w"]].float()})
    assert "tensor 'more' is not of this model" in stored(more=torch.zeros(2))
    assert "must be finite and not negative" in stored(**{names["s"]: -tensors[names["s"]]})
    assert "must be -127 to 127" in stored(**{names["w"]: torch.full_like(tensors[names["w"]], -128)})
    file.write_bytes(whole[:-10])
    assert "model.safetensors" in refused(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        pk.load(folder, into=Encoder())
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        pk.load(folder / "nowhere")


def test_what_save_refuses(tmp_path):
    small = small_model(Mlp)
    with pytest.raises(ValueError, match="max_shard_size must be '5GB', .*one file .got '1MB'"):
        pk.save(small, tmp_path / "m", max_shard_size="1MB")
    with pytest.raises(ValueError, match="save: model is not compact .Mlp."):
        pk.save(build(Mlp), tmp_path / "m")

    class Talkative(Mlp):
        def get_extra_state(self):
            return {"more": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="state_dict.. must hold tensors only .got a dict at '_extra_state'"):
        pk.save(small_model(Talkative), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_without_transformers(tmp_path):
    """All of the way of a plain model in a process that cannot import transformers."""
    code = textwrap.dedent(f"""
        import sys
        for missing in ("transformers", "huggingface_hub", "datasets", "accelerate"):
            sys.modules[missing] = None
        import torch
        import prunekern as pk

        class Mlp(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.fc1, self.fc2 = torch.nn.Linear(7, 19), torch.nn.Linear(19, 3)

            def forward(self, x):
                return self.fc2(torch.relu(self.fc1(x)))

        pk.families.register(Mlp, [pk.families.mlp_group("fc1", "fc2")])
        torch.manual_seed(0)
        model, again, x = Mlp(), Mlp(), torch.randn(16, 7)
        base = {{name: tensor.clone() for name, tensor in model.state_dict().items()}}
        pk.families.check(model, x)
        pruner = pk.attach(model, pk.PruneConfig(rank=2, sparsity=0.4, warm_steps=2, ramp_steps=2))
        optimizer = torch.optim.AdamW(pruner.param_groups())
        for step in range(6):
            if step == 4:
                pruner.finalize()
                pruner.shrink(optimizer)
            (model(x).square().mean() + pruner.penalty()).backward()
            optimizer.step(), pruner.step(), optimizer.zero_grad()
        pk.save_adapter(pruner, {str(tmp_path / "adapter")!r})
        again.load_state_dict(base)
        pk.load_adapter(again, {str(tmp_path / "adapter")!r})
        assert torch.equal(again.eval()(x), model.eval()(x))
        small = pk.compact(model.eval())
        for weights in (None, "bf16", "int8", "int4"):
            pk.save(small, {str(tmp_path / "m")!r}, weights=weights)
            loaded = pk.load({str(tmp_path / "m")!r}, into=Mlp())
        assert pk.plan(loaded).macs(2) < 0.7 * pk.plan(loaded).dense_macs(2)
        assert (small(x) - model(x)).abs().max() < 1e-5
        assert not [name for name, module in sys.modules.items() if name.startswith("transformers") and module]
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
