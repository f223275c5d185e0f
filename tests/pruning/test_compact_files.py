"""`compact_files` against `compact` and `save`: the same bits, in memory that would not hold the model."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.nn import merging
from prunekern.pruning import compact_files
from prunekern.pruning.adapter import load_adapter, load_base
from prunekern.storage import progress
from prunekern.storage.shards import write_shard
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.compact_folders import python
from tests.helpers.on_disk import content, edit_json, litter
from tests.helpers.streamed import batch, build, names_of, on_disk, rename, run, tensors, trained
from tests.helpers.tiny_models import attached

ENCODERS = [(f, t) for f in tiny_models.FAMILIES for t in ("sequence", "masked_lm", "base")]
DECODERS = [*((f, "causal") for f in tiny_decoders.FAMILIES), ("llama", "sequence"), ("llama", "base")]
MODELS = ENCODERS + DECODERS


def check(folder, pruner, **options):
    """OUT against `compact` and `save` of the trained model: bits, files, plan, logits."""
    small = pk.compact(pruner.model)
    pk.save(small, folder / "want", **options)
    assert run(folder, **options) == pk.plan(small)
    want, got = tensors(folder / "want"), tensors(folder / "out")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert tensor.dtype == got[name].dtype and torch.equal(tensor, got[name]), name
    one, two = (pk.load(folder / name) for name in ("out", "want"))
    assert type(one) is type(two) and pk.plan(one) == pk.plan(two)
    assert torch.equal(tiny_models.logits(one, batch(one)), tiny_models.logits(two, batch(one)))
    assert not litter(folder)


# -- the same as in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family,task", MODELS)
def test_equals_compact_and_save(family, task, dtype, tmp_path):
    check(tmp_path, on_disk(tmp_path, build(family, task, dtype)))
    out, want = content(tmp_path / "out"), content(tmp_path / "want")
    assert out["model.safetensors"] == want["model.safetensors"] and out.keys() == want.keys()


@pytest.mark.parametrize("family,task", [("distilbert", "sequence"), ("bert", "masked_lm"), ("qwen2", "causal")])
def test_shards_in_and_out(family, task, tmp_path):
    """All files, JSON too, are those of the way through memory; bf16, whose bits do not hang on alignment."""
    pruner = on_disk(tmp_path, build(family, task, torch.bfloat16), "15KB")
    assert len(list((tmp_path / "base").glob("model-*"))) > 3
    check(tmp_path, pruner, max_shard_size="30KB")
    dense = load_base(tmp_path / "base", tmp_path / "adapter")
    load_adapter(dense, tmp_path / "adapter")
    pk.save(pk.compact(dense), tmp_path / "loaded", max_shard_size="30KB")
    assert content(tmp_path / "out") == content(tmp_path / "loaded")
    assert len([n for n in names_of(tmp_path / "out") if n.startswith("model-")]) > 1
    run(tmp_path)  # in one file again: no old shard stays
    assert "model.safetensors" in names_of(tmp_path / "out")
    assert not [n for n in names_of(tmp_path / "out") if "-of-" in n or "index" in n]


def test_order_of_more_than_ten_layers(tmp_path):
    check(tmp_path, on_disk(tmp_path, build("llama", "causal", layers=12)), max_shard_size="40KB")
    shard = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    norms = [shard[f"model.layers.{i}.input_layernorm.weight"] for i in range(12)]
    assert norms == sorted(norms) and norms[0] < norms[-1]


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("family,task", [("roberta", "token"), ("mistral", "causal")])
def test_any_share(family, task, share, tmp_path):
    check(tmp_path, on_disk(tmp_path, build(family, task), share=share))


@pytest.mark.parametrize(
    "options",
    [{"preset": "paper"}, {"targets": ["k_lin", "lin1"]}, {"norm_grad": "full"}, {"alpha": 3.0, "dropout": 0.1}],
)
def test_any_config(options, tmp_path):
    check(tmp_path, on_disk(tmp_path, build("distilbert", "sequence"), **options))


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("family,task", [("bert", "sequence"), ("llama", "causal")])
def test_adapters_of_a_run_with_warm_steps(family, task, steps, tmp_path):
    """Saved while warm, and after; loaded by others than the run itself."""
    model = build(family, task)
    model.save_pretrained(tmp_path / "base")
    pruner = attached(model, sparsity=0.4, warm_steps=5, ramp_steps=2)
    optimizer = torch.optim.SGD(pruner.param_groups(1e-2))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(model)).logits.square().mean().backward()
        optimizer.step()
        pruner.step()
    for last in (False, True):  # as a checkpoint in the middle, and at the end
        if last:
            pruner.finalize()
        pk.save_adapter(pruner, tmp_path / "adapter")
        loaded = pk.load_adapter(build(family, task), tmp_path / "adapter")
        assert loaded.warm is (steps < 5 and not last) and loaded.steps == steps
        assert loaded.plan() == pruner.plan()
        check(tmp_path, pruner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family,task", [("bert", "sequence"), ("llama", "causal")])
@pytest.mark.parametrize("shrink", [False, True])
def test_final_and_shrunk_adapters(family, task, dtype, shrink, tmp_path):
    model = build(family, task, dtype)
    model.save_pretrained(tmp_path / "base")
    pruner = attached(model, sparsity=0.3)
    pruner.finalize()
    if shrink:
        pruner.shrink()
        with torch.no_grad():
            for layer in pruner.layers.values():
                layer.B.add_(0.01)
                layer.refresh()
    pk.save_adapter(pruner, tmp_path / "adapter")
    check(tmp_path, pruner)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_written_once(tied, tmp_path):
    pruner = on_disk(tmp_path, build("llama", "causal", tie_word_embeddings=tied))
    check(tmp_path, pruner)
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not tied
    if tied:  # a base that holds the twin, or both
        own = tensors(tmp_path / "base")
        twin = own | {"lm_head.weight": own["model.embed_tokens.weight"].clone()}
        save_file(twin, tmp_path / "base" / "model.safetensors")
        check(tmp_path, pruner)
        del twin["model.embed_tokens.weight"]
        save_file(twin, tmp_path / "base" / "model.safetensors")
        check(tmp_path, pruner)


@pytest.mark.parametrize("stored,dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")])
def test_trained_in_another_dtype_than_stored(stored, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(compact_files, "ROWS", 7)
    monkeypatch.setattr(merging, "ROWS", 7)
    build("qwen3", "causal", getattr(torch, stored)).save_pretrained(tmp_path / "base")
    cls = type(build("qwen3", "causal"))
    pruner = trained(cls.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype)))
    pk.save_adapter(pruner, tmp_path / "adapter")
    for layer in pruner.layers.values():  # out of the mapped file: see `_merged`
        layer.weight.data = layer.weight.data.clone()
    check(tmp_path, pruner)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {getattr(torch, dtype)}


def test_dtype_of_an_adapter_without_one_is_that_of_the_files(tmp_path):
    pruner = on_disk(tmp_path, build("distilbert", "sequence", torch.bfloat16))
    edit_json(tmp_path / "adapter" / "adapter_config.json", lambda c: c["model_config"].pop("dtype"))
    check(tmp_path, pruner)


@pytest.mark.parametrize("family,task", [(f, "sequence") for f in (*tiny_models.FAMILIES, "llama")])
def test_headless_base_under_a_head(family, task, tmp_path):
    pruner = on_disk(tmp_path, build(family, task))
    prefix = pruner.model.base_model_prefix + "."
    head = {n.split(".")[0] + "." for n in tensors(tmp_path / "base") if not n.startswith(prefix)}
    rename(tmp_path, lambda n: n.removeprefix(prefix), tuple(head))
    assert not [n for n in tensors(tmp_path / "base") if n.startswith((prefix, *head))]
    check(tmp_path, pruner)


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "llama"])
def test_base_with_a_head_under_a_bare_model(family, tmp_path):
    model = build(family, "base")
    pruner = on_disk(tmp_path, model)
    rename(tmp_path, lambda n: f"{model.base_model_prefix}.{n}")
    check(tmp_path, pruner)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_headless_base_of_a_language_model_with_tied_embeddings(family, tmp_path):
    pruner = on_disk(tmp_path, build(family, "causal", tie_word_embeddings=True))
    rename(tmp_path, lambda n: n.removeprefix("model."))
    check(tmp_path, pruner)


def test_what_old_checkpoints_hold_besides_is_left_out(tmp_path):
    pruner = on_disk(tmp_path, build("llama", "causal"))
    file = tmp_path / "base" / "model.safetensors"
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "embeddings.position_ids": torch.arange(4)}
    save_file(load_file(file) | more | {"cls.seq_relationship.weight": torch.ones(2, 2)}, file)
    check(tmp_path, pruner)


def test_generation_config_of_the_base(tmp_path):
    pruner = on_disk(tmp_path, build("llama", "causal"))
    text = '{"temperature": 0.6, "do_sample": false, "max_length": 77}'  # save_pretrained refuses this one
    (tmp_path / "base" / "generation_config.json").write_text(text)
    run(tmp_path)
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    (tmp_path / "base" / "generation_config.json").unlink()
    check(tmp_path, pruner)
    assert content(tmp_path / "out").keys() == content(tmp_path / "want").keys()


# -- memory ----------------------------------------------------------------------------------------------------

BIG = """
import json, resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
import prunekern as pk
from prunekern import hf
from prunekern.pruning.compact_files import compact_files
from prunekern.pruning.adapter import load_base, load_adapter
folder, way = Path(sys.argv[1]), sys.argv[2]
budget, shard = int(sys.argv[3]), int(sys.argv[4])

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) << 10

# What the first call of everything takes is not the model's: run it once on something small.
torch.randn(300, 300) @ torch.randn(300, 300)
compact_files(folder / "tiny" / "base", folder / "tiny" / "adapter", folder / "tiny" / "out")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
rss = status("VmHWM")
limit = status("VmData") + budget
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if way == "streaming":
    compact_files(folder / "base", folder / "adapter", folder / "out", max_shard_size=shard)
else:
    dense = load_base(folder / "base", folder / "adapter")
    load_adapter(dense, folder / "adapter")
    pk.save(pk.compact(dense), folder / "out")
print(json.dumps({"peak": status("VmHWM") - rss}))
"""


@pytest.mark.slow
def test_a_model_larger_than_memory(tmp_path, monkeypatch):
    """A limit on private memory (RLIMIT_DATA) of two linears, a shard and a little: the way through memory hits it.

    Private mappings count, so that the shard of BASE in use does, whole.
    """
    # glibc keeps freed blocks of up to 32 MB, the linears of a 7B model are larger: keep none of ours either.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    (tmp_path / "tiny").mkdir()
    on_disk(tmp_path / "tiny", build("llama", "causal"))
    hidden, ffn, layers, shard = 1280, 3328, 3, 18 << 20
    options = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 10, "num_key_value_heads": 10}
    on_disk(tmp_path, build("llama", "causal", layers=layers, head_dim=128, **options), shard, rank=4)
    total = sum(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    linear = 4 * hidden * ffn
    budget = 2 * linear + shard + (3 << 20)  # the last for what MKL keeps on some CPUs
    assert total > 4 * budget and total > 200e6  # large beside what a process takes anyway
    done = python(BIG, tmp_path, "streaming", budget, shard)
    assert json.loads(done.stdout)["peak"] < budget
    assert pk.load(tmp_path / "out") is not None
    failed = python(BIG, tmp_path, "in memory", budget, shard, check=False)
    assert failed.returncode != 0
    assert re.search("memory|allocate", failed.stderr, re.I), failed.stderr[-500:]


def test_shards_are_what_safetensors_writes(tmp_path):
    own = {
        "b": torch.randn(3, 5),
        "a.10": torch.randn(4).bfloat16(),
        "a.2": torch.randn(0, 7),
        "ü": torch.randn(2, 2, dtype=torch.float64),
        "c": torch.randn(5, 3).T,
    }
    save_file({n: t.contiguous() for n, t in own.items()}, tmp_path / "want", metadata={"format": "pt"})
    write_shard(tmp_path / "got", {n: t.to("meta") for n, t in own.items()}, lambda n: own[n].contiguous().split(2))
    assert (tmp_path / "got").read_bytes() == (tmp_path / "want").read_bytes()


# -- progress, and what goes wrong -----------------------------------------------------------------------------


def test_progress_shows_when_it_takes_long(tmp_path, monkeypatch):
    on_disk(tmp_path, build("distilbert", "sequence"))
    shown = []
    for seconds in (60.0, -1.0):
        monkeypatch.setattr(progress, "QUIET_SECONDS", seconds)
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        run(tmp_path, console=console)
        shown.append(console.file.getvalue())
    assert shown[0] == "" and "compacting" in shown[1] and "/40" in shown[1]
