"""`to_peft`: the adapter of an unpruned run, which stock PEFT loads; what PEFT computes is the reference."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import prunekern as pk
from prunekern import from_peft, to_peft
from tests.helpers import tiny_models
from tests.helpers.on_disk import content, litter
from tests.helpers.peft_adapters import PATTERNS, TOLERANCE, batch, build, distilbert, no_pruning, with_adapter
from tests.helpers.tiny_models import attached, difference, keep_only, logits, state, unchanged

peft = pytest.importorskip("peft")


def unpruned(family="distilbert", task="sequence", dtype=torch.float32, **options):
    """An attached model after training, head included, whose masks keep everything."""
    model = build(family, task, dtype=dtype)
    pruner = keep_only(attached(model, **{"rank": 3, "alpha": 5.0} | options), {})
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            owner = name.rpartition(".")[0]
            if p.requires_grad and owner not in pruner.layers and not owner.endswith(".mask"):
                p.add_(0.3 * torch.randn(p.shape, generator=g).to(p))
    return pruner


CASES = [
    ("distilbert", "sequence", {}),
    ("bert", "sequence", {}),
    ("roberta", "sequence", {"targets": ["query", "value"], "sparsity": 0.05}),
    ("llama", "causal", {}),
    ("llama", "sequence", {"norm_grad": "full"}),
    ("distilbert", "masked_lm", {}),
    ("bert", "masked_lm", {}),
    ("roberta", "masked_lm", {}),
    ("bert", "token", {"preset": "paper", "dropout": 0.25}),
    ("distilbert", "base", {}),
]
CHILD = """
import json, sys
sys.modules["prunekern"] = None
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder, cls in json.loads(sys.argv[1]):
    dense = getattr(transformers, cls).from_pretrained(folder + "/dense")
    model = PeftModel.from_pretrained(dense, folder + "/adapter").eval()
    with torch.no_grad():
        out = model(**load_file(folder + "/inputs.safetensors"))
    y = out.last_hidden_state if "last_hidden_state" in out else out.logits
    save_file({"y": y.contiguous()}, folder + "/outputs.safetensors")
assert not [m for m in sys.modules if m.startswith("prunekern") and sys.modules[m]]
"""


def test_stock_peft_loads_it_without_prunekern(tmp_path):
    """One process for all cases: importing torch takes longer than they do."""
    from safetensors.torch import save_file

    jobs, wanted = [], {}
    for family, task, options in CASES:
        folder = tmp_path / f"{family}-{task}"
        dense = build(family, task)
        dense.save_pretrained(folder / "dense")
        pruner = unpruned(family, task, **options)
        save_file(batch(family), folder / "inputs.safetensors")
        to_peft(pruner, folder / "adapter")
        wanted[folder] = logits(pruner.model, batch(family))
        assert difference(logits(dense, batch(family)), wanted[folder]) > 0.05
        jobs.append((str(folder), type(dense).__name__))
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(jobs)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, want in wanted.items():
        got = load_file(folder / "outputs.safetensors")["y"]
        assert difference(got, want) < TOLERANCE[torch.float32], folder.name


@pytest.mark.parametrize("family,task,options", CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_round_trip(family, task, options, tmp_path):
    pruner = unpruned(family, task, **options)
    want = logits(pruner.model, batch(family))
    to_peft(pruner, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(build(family, task), tmp_path / "a")
    back = from_peft(loaded, pruner.config)
    assert back.config == pruner.config
    assert torch.equal(logits(back.model, batch(family)), want)
    theirs = back.model.state_dict()
    for name, tensor in pruner.model.state_dict().items():
        if ".mask." not in name:
            assert torch.equal(tensor, theirs[name]), name
    ours = [id(p) for p in pruner.model.parameters()], [id(p) for p in back.model.parameters()]
    assert len(set(ours[0])) == len(set(ours[1]))  # what was tied is tied


def test_round_trip_of_patterns_and_float64(tmp_path):
    model = with_adapter(build(dtype=torch.float64), **PATTERNS)
    want = logits(model, batch())
    pruner = from_peft(model, no_pruning())
    to_peft(pruner, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(build(dtype=torch.float64), tmp_path / "a")
    assert difference(logits(loaded.eval(), batch()), want) < TOLERANCE[torch.float64]
    back = from_peft(loaded, no_pruning())
    assert {n: (m.rank, m.scale) for n, m in back.layers.items()} == {
        n: (m.rank, m.scale) for n, m in pruner.layers.items()
    }


def test_bf16(tmp_path):
    """Adapters are fp32 on both sides; what differs is where a layer rounds to 8 bits."""
    model = with_adapter(build(dtype=torch.bfloat16))
    exact, theirs = logits(copy.deepcopy(model).float(), batch()), logits(model, batch()).float()
    pruner = from_peft(model, no_pruning())
    got = logits(pruner.model, batch())
    assert difference(got.float(), exact) < min(0.01, 2 * difference(theirs, exact))
    to_peft(pruner, tmp_path / "a")
    back = from_peft(peft.PeftModel.from_pretrained(build(dtype=torch.bfloat16), tmp_path / "a"), no_pruning())
    assert torch.equal(logits(back.model, batch()), got)
    for name, layer in pruner.layers.items():
        assert all(torch.equal(getattr(layer, n), getattr(back.layers[name], n)) for n in ("A", "B", "magnitude"))


def test_to_peft_leaves_the_model_and_other_files(tmp_path):
    pruner = unpruned(dropout=0.1)
    model = pruner.model
    before, modules, random = state(model), dict(model.named_modules()), torch.random.get_rng_state()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    to_peft(pruner, tmp_path / "a")
    unchanged(model, before)
    assert dict(model.named_modules()) == modules and torch.equal(torch.random.get_rng_state(), random)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(content(tmp_path / "a"))
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["use_dora"] and written["peft_type"] == "LORA" and written["task_type"] == "SEQ_CLS"
    assert written["lora_dropout"] == 0.1 and not written["rank_pattern"] and not written["alpha_pattern"]
    assert {"pre_classifier", "classifier"} <= set(written["modules_to_save"])
    (tmp_path / "a" / "README.md").write_text("mine")
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"x")
    to_peft(pruner, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine" and (tmp_path / "a" / "optimizer.pt").exists()
    assert not litter(tmp_path)


def test_to_peft_before_the_first_step_of_training_mode(tmp_path):
    """Masks are random in training mode until they are final: what counts is what they keep in eval mode."""
    pruner = unpruned(sparsity=0.3, warm_steps=5)
    to_peft(pruner, tmp_path / "a")
    pruner.model.train()
    to_peft(pruner, tmp_path / "b")
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_to_peft_refuses_what_is_pruned(tmp_path):
    pruner = unpruned(sparsity=0.3)
    up = tiny_models.names("distilbert", 1)["up"]
    on = torch.ones(tiny_models.FFN, dtype=torch.bool)
    on[[5, 9]] = False
    keep_only(pruner, {up: on})
    message = rf"keep everything \(got pruned: 2 rows and 0 columns of '{up}', 2 layers in all\).*use prunekern.compact"
    with pytest.raises(ValueError, match=message):
        to_peft(pruner, tmp_path / "a")
    pruner.finalize()
    with pytest.raises(ValueError, match="masks must keep everything"):
        to_peft(pruner, tmp_path / "a")
    whole = unpruned(sparsity=0.0)
    whole.finalize()
    to_peft(whole, tmp_path / "whole")
    whole.shrink()
    with pytest.raises(ValueError, match="must not be shrunk"):
        to_peft(whole, tmp_path / "a")
    assert not (tmp_path / "a").exists() and not litter(tmp_path)


def test_to_peft_refuses_what_else_was_trained(tmp_path):
    pruner = unpruned()
    pruner.model.distilbert.embeddings.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"may be trained \(got 'distilbert.embeddings.LayerNorm.weight'\)"):
        to_peft(pruner, tmp_path / "a")


@pytest.mark.parametrize("shrunk", [False, True])
def test_prunekern_adapter_of_patterns(shrunk, tmp_path):
    """Layers keep the rank and scale of their own through save_adapter and load_adapter."""
    pruner = from_peft(distilbert(**PATTERNS), pk.PruneConfig(sparsity=0.3))
    if shrunk:
        pruner.finalize()
        pruner.shrink()
    pk.save_adapter(pruner, tmp_path / "a")
    back = pk.load_adapter(build(), tmp_path / "a")
    own = {n: (m.rank, m.scale) for n, m in pruner.layers.items()}
    assert {n: (m.rank, m.scale) for n, m in back.layers.items()} == own
    assert torch.equal(logits(back.model, batch()), logits(pruner.model, batch()))


@pytest.mark.parametrize("family,task", [("distilbert", "sequence"), ("llama", "causal")])
def test_rows_of_new_tokens_come_along(family, task, tmp_path):
    """peft #1457. As with PEFT's own adapters, the dense model is resized before it gets them."""
    build(family, task).save_pretrained(tmp_path / "base")
    cls = type(build(family, task))

    def resized(seed):
        torch.manual_seed(seed)
        dense = cls.from_pretrained(tmp_path / "base").eval()
        dense.resize_token_embeddings(dense.config.vocab_size + 3, mean_resizing=False)
        return dense

    pruner = keep_only(attached(resized(1)), {})
    to_peft(pruner, tmp_path / "a")
    inputs = batch(family)
    inputs["input_ids"][:, 1] = pruner.model.config.vocab_size - 1
    back = peft.PeftModel.from_pretrained(resized(2), tmp_path / "a").eval()
    assert difference(logits(back, inputs), logits(pruner.model.eval(), inputs)) < TOLERANCE[torch.float32]


def test_a_model_with_a_compiled_part_is_refused(tmp_path):
    """PyTorch #101107: its names would not load."""
    pruner = unpruned()
    pruner.model.classifier = torch.compile(pruner.model.classifier, backend="eager")
    for write in (to_peft, pk.save_adapter):
        with pytest.raises(ValueError, match=rf"{write.__name__}: model must not have a wrapped part .*'classifier'"):
            write(pruner, tmp_path / "a")
    assert not (tmp_path / "a").exists()
