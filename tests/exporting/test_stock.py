"""Rule "stock": `finalize`, files that transformers loads without prunekern, training."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

import prunekern as pk
from prunekern.exporting import stock
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.tiny_decoders import MANY_HEADS
from tests.helpers.tiny_models import (
    FFN,
    HEADS,
    attached,
    batch,
    build,
    difference,
    keep_only,
    logits,
    names,
    prune,
    state,
    unchanged,
)

# -- finalize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["params", "macs"])
@pytest.mark.parametrize("family", (*tiny_models.FAMILIES, *tiny_decoders.FAMILIES))
def test_finalize_reports_what_is_kept_and_given_up(family, cost):
    is_decoder = family in tiny_decoders.FAMILIES
    model = tiny_decoders.build(family) if is_decoder else build(family)
    pruner = attached(model, sparsity=0.4, cost=cost, align=8)
    before = state(model)
    found = pruner.compare_stock()
    unchanged(model, before)
    report = pruner.finalize("stock")
    assert pruner.finalized and report["sparsity"] == pruner.plan().sparsity(cost) >= 0.4
    assert report["given_up"] == found["given_up"] == found["kept_score"]["learned"] - found["kept_score"]["stock"] > 0
    assert 0.98 < found["kept_score"]["learned"] <= 1 and report["by_kind"] == found["by_kind"]["stock"]
    changes = stock.config_changes(model, pk.plan(model))
    width = changes.get("hidden_dim", changes.get("intermediate_size"))
    assert report["by_kind"]["ffn"] == [2 * width, 2 * FFN] and width % 8 == 0
    if not is_decoder:
        assert report["by_kind"]["value"][0] == report["by_kind"]["value"][1]
    with pytest.raises(RuntimeError, match="stock.compare: the masks are final already"):
        pruner.compare_stock()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_encoders_lose_their_ffn_only_and_refuse_more(family):
    model = build(family)
    pruner = attached(model, sparsity=0.7)
    before = state(model)
    for call in (pruner.check_rule, pruner.finalize):
        with pytest.raises(ValueError, match=rf"sparsity 0.7 .*: {HEADS} of {HEADS} heads and 1 of 96 FFN channels"):
            call("stock")
    unchanged(model, before)
    assert not pruner.finalized
    with pytest.raises(ValueError, match="all FFN channels .their masks are not in every block"):
        attached(build(family), preset="paper", sparsity=0.1).finalize("stock")


def test_saliency_decides_where_it_was_gathered():
    """As with the learned rule: masks made final in the warm steps start from it."""
    model = build()
    pruner = attached(model, sparsity=0.3, warm_steps=10, align=8)
    optimizer = torch.optim.AdamW(pruner.param_groups(1e-3, 0.0))
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    pruner.step()
    report = pruner.finalize("stock")
    assert report["given_up"] > 0 and pruner.masks[names("distilbert")["up"]].logits.std() > 1


# -- files -----------------------------------------------------------------------------------------------------

CASES = {
    "distilbert-sequence": lambda: build("distilbert"),
    "distilbert-base": lambda: build("distilbert", "base"),
    "bert-masked_lm": lambda: build("bert", "masked_lm"),
    "roberta-token": lambda: build("roberta", "token"),
    "llama-causal": lambda: tiny_decoders.build("llama", tie_word_embeddings=True),
    "llama-sequence": lambda: tiny_decoders.build("llama", "sequence"),
    "mistral-causal": lambda: tiny_decoders.build("mistral", **MANY_HEADS),
    "qwen2-causal": lambda: tiny_decoders.build("qwen2"),
    "qwen3-causal": lambda: tiny_decoders.build("qwen3"),
}
CHILD = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "prunekern":
                raise ImportError("prunekern is not here")

    sys.meta_path.insert(0, Absent())
    import json, pathlib, torch, transformers as t
    torch.set_num_threads(1)
    autos = {"sequence": t.AutoModelForSequenceClassification, "token": t.AutoModelForTokenClassification,
             "masked_lm": t.AutoModelForMaskedLM, "causal": t.AutoModelForCausalLM, "base": t.AutoModel}
    for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        case = torch.load(folder / "case.pt")
        auto = autos[folder.name.split("-")[1]]
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        got, seen = {}, case["inputs"]["attention_mask"].bool()
        with torch.no_grad():
            out = model(**case["inputs"])
            got["logits"] = out.last_hidden_state if "last_hidden_state" in out else out.logits
            if "tokens" in case:
                got["tokens"] = model.generate(**case["inputs"], **case["options"])
        torch.save(got, folder / "got.pt")
    try:
        import prunekern
    except ImportError:
        print("absent")
"""
GENERATE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": True}


def case_of(name):
    """An attached model with final masks, some heads gone where they can be, and its inputs."""
    model, family = CASES[name](), name.split("-")[0]
    is_decoder = family in tiny_decoders.FAMILIES
    pruner = attached(model, sparsity=0.4, align=8, seed=3)
    with torch.no_grad():  # the heads' logits are low
        for carrier, mask in pruner.masks.items():
            mask.logits -= 2.0 * (pruner.table.groups[carrier].kind in ("value", "query_key"))
    pruner.finalize("stock")
    return model, (tiny_decoders if is_decoder else tiny_models).batch()


def seen(values, inputs):
    """Of tokens that are no padding: what a padded query gets differs between attention kernels."""
    mask = inputs["attention_mask"].bool()
    return values[mask] if values.shape[:2] == mask.shape else values


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name -> (masked model, inputs, folder) once a process without prunekern has run every folder."""
    root = tmp_path_factory.mktemp("stock")
    found = {}
    for name in CASES:
        model, inputs = case_of(name)
        stock.save_stock(model, root / name)
        case = {"inputs": inputs}
        if name.endswith("causal"):
            case |= {"tokens": model.generate(**inputs, **GENERATE), "options": GENERATE}
        torch.save(case, root / name / "case.pt")
        found[name] = (model, inputs, root / name)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "absent"
    return found


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_it_and_computes_what_the_masked_model_does(name, loaded):
    model, inputs, folder = loaded[name]
    case, got = torch.load(folder / "case.pt"), torch.load(folder / "got.pt")
    want = logits(model, inputs)
    assert difference(seen(got["logits"], inputs), seen(want, inputs)) <= 1e-5
    assert difference(seen(logits(pk.compact(model), inputs), inputs), seen(want, inputs)) <= 1e-5
    if name.endswith("causal"):
        assert torch.equal(got["tokens"], case["tokens"])


@pytest.mark.parametrize("name", CASES)
def test_config_says_the_new_shape_and_nothing_else(name, loaded, tmp_path):
    model, _, folder = loaded[name]
    config = json.loads((folder / "config.json").read_text())
    changes = stock.config_changes(model, pk.plan(model))
    assert "quantization_config" not in config and changes.items() <= config.items()
    CASES[name]().save_pretrained(tmp_path)
    dense = json.loads((tmp_path / "config.json").read_text())
    differing = {k for k in config.keys() | dense.keys() if config.get(k) != dense.get(k)}
    assert differing <= set(changes)
    family = name.split("-")[0]
    if family in ("llama", "qwen2"):
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (3, 1, 12)
    if family == "mistral":
        assert config["num_key_value_heads"] < MANY_HEADS["num_key_value_heads"]
        assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]


@pytest.mark.parametrize("name", ["distilbert-sequence", "llama-causal", "mistral-causal"])
def test_from_the_compact_model_too_saved_and_loaded_or_shrunk(name, loaded, tmp_path):
    model, _, folder = loaded[name]
    small = pk.compact(model)
    before = state(small)
    stock.save_stock(small, tmp_path / "compact")
    unchanged(small, before)
    pk.save(small, tmp_path / "packed")
    stock.save_stock(pk.load(tmp_path / "packed"), tmp_path / "loaded")
    for other in ("compact", "loaded"):
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / other / file).read_bytes() == (folder / file).read_bytes(), (other, file)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_rounded_weights_are_written_in_one_dtype(weights, loaded, tmp_path):
    model, inputs, folder = loaded["llama-causal"]
    pk.save(pk.compact(model), tmp_path / "packed")
    small = pk.load(tmp_path / "packed", weights=weights)
    stock.save_stock(small, tmp_path / "stock")
    again = type(model).from_pretrained(tmp_path / "stock")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    # The head of `small` is rounded too; the file's is tied to embeddings that are not.
    assert difference(seen(logits(again, inputs), inputs), seen(logits(small, inputs), inputs)) <= (
        0.5 if weights == "int4" else 0.03
    )
    assert (tmp_path / "stock" / "model.safetensors").stat().st_size <= (folder / "model.safetensors").stat().st_size


def test_folder_is_replaced_and_its_tokenizer_stays(tmp_path):
    model, _ = case_of("distilbert-sequence")
    pk.save(pk.compact(model), tmp_path / "m")
    (tmp_path / "m" / "vocab.txt").write_text("words")
    stock.save_stock(model, tmp_path / "m")
    assert (tmp_path / "m" / "vocab.txt").read_text() == "words"
    with pytest.raises(ValueError, match="holds no prunekern plan"):
        pk.load(tmp_path / "m")


def test_generation_settings_go_along(tmp_path):
    model, _ = case_of("llama-causal")
    model.generation_config.max_new_tokens = 17
    stock.save_stock(model, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 17


def test_without_anything_removed_it_is_the_merged_dense_model(tmp_path):
    model = build()
    keep_only(attached(model), {})
    stock.save_stock(model, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert difference(logits(again, batch()), logits(model, batch())) <= 1e-5


# -- refusals --------------------------------------------------------------------------------------------------


def encoder_kept(**parts):
    """Kept groups by part of the block and layer: {"up": {1: array}}."""
    return {names("distilbert", i)[part]: kept for part, layers in parts.items() for i, kept in layers.items()}


REFUSED = {
    "widths differ": (
        lambda: encoder_kept(up={0: np.arange(FFN) < 40, 1: np.arange(FFN) < 48}),
        r"layer '\S*layer.1.ffn.lin1' keeps 48 channels, '\S*layer.0.ffn.lin1' keeps 40",
    ),
    "residual rows": (
        lambda: encoder_kept(down={1: np.arange(48) > 0}),
        r"layer '\S*layer.1.ffn.lin2' keeps 47 of 48 rows of the residual",
    ),
    "parts of a head": (
        lambda: encoder_kept(q={0: np.arange(48) > 0}),
        r"layer '\S*layer.0.attention.k_lin' keeps 47 rows that are not those of whole heads",
    ),
    "a head that must stay": (
        lambda: encoder_kept(v={i: np.arange(48) >= 12 for i in range(2)}),
        r"layer '\S*layer.0.attention.v_lin' keeps 3 of 4 heads, and a stock distilbert config takes 4",
    ),
    "no FFN": (
        lambda: encoder_kept(up={i: np.zeros(FFN, bool) for i in range(2)}),
        r"layer '\S*layer.0.ffn.lin1' keeps no channel",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_plans_that_a_stock_config_cannot_say_are_refused(what, tmp_path):
    kept, message = REFUSED[what]
    model = build()
    keep_only(attached(model), kept())
    for form in (model, pk.compact(model)):
        with pytest.raises(ValueError, match=f"save_stock: {message}.*finalize.'stock'"):
            stock.save_stock(form, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_decoders_refuse_blocks_with_different_heads(tmp_path):
    model = tiny_decoders.build("llama")
    keep_only(attached(model), {tiny_decoders.names(1)["v"]: np.arange(24) < 12})
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.self_attn.v_proj' keeps 1 heads, \S* keeps 2"):
        stock.save_stock(model, tmp_path / "m")


def test_ragged_and_dense_models_are_refused(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="has no masked layers; call prunekern.attach"):
        stock.save_stock(model, tmp_path / "m")
    prune(attached(model), 0.4)
    with pytest.raises(ValueError, match="save_stock: layer '.*make the masks final with pruner.finalize"):
        stock.save_stock(model, tmp_path / "m")


# -- training --------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """16 sequences of 8 tokens, with a label each, or for language models their own tokens."""

    def __init__(self, labels_are_tokens):
        self.ids = torch.randint(5, 50, (16, 8), generator=torch.Generator().manual_seed(0))
        self.labels = self.ids if labels_are_tokens else torch.arange(16) % 3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(self.ids[i]), "labels": self.labels[i]}


@pytest.mark.parametrize("family", ["distilbert", "mistral"])
def test_trainer_finalises_so_and_trains_on_without_what_is_gone(family, tmp_path):
    model = build() if family == "distilbert" else tiny_decoders.build(family, **MANY_HEADS)
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 6}
    options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    trainer = pk.PruneTrainer(
        args=TrainingArguments(output_dir=str(tmp_path / "run"), **options),
        pruner=attached(model, sparsity=0.4, align=8),
        train_dataset=Rows(labels_are_tokens=family == "mistral"),
        stage_one=0.5,
        warm=0.5,
        rule="stock",
    )
    trainer.train()
    pruner = trainer.pruner
    assert pruner.shrunk and trainer.report["sparsity"] >= 0.4 and trainer.report["given_up"] > 0
    inputs = batch(padded=False)
    masked = logits(model.eval(), inputs)
    small = pk.compact(model)
    for form, folder in ((model, tmp_path / "shrunk"), (small, tmp_path / "compact")):
        stock.save_stock(form, folder)
        assert difference(logits(type(small).from_pretrained(folder), inputs), masked) <= 1e-5
