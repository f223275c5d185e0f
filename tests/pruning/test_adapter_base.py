"""An adapter and its base: what `save_adapter` writes loads, and what it does not write is the base's, or refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekern as pk
from prunekern.pruning.adapter import load_adapter_state, load_base
from tests.helpers.on_disk import edit_json
from tests.helpers.streamed import batch, build, trained
from tests.helpers.tiny_models import difference, logits, names, state, unchanged

MODELS = [("distilbert", "sequence"), ("bert", "masked_lm"), ("roberta", "token"), ("llama", "causal")]
WORDS = "distilbert.embeddings.word_embeddings.weight"
UP = names("distilbert", 1)["up"]
NEAR = 1e-6  # where a tensor that is mapped from a file begins in memory can change the last bits of a product
NORM = "distilbert.transformer.layer.1.sa_layer_norm.weight"


def based(folder, family="distilbert", task="sequence", **options):
    """A model of the folder `base`, where it was written first."""
    model = build(family, task, **options)
    model.save_pretrained(folder / "base")
    return type(model).from_pretrained(folder / "base").eval()


def with_tokens(model, count=3, seed=5):
    """As for special tokens: `count` new rows, drawn at random."""
    torch.manual_seed(seed)
    model.resize_token_embeddings(model.config.vocab_size + count, mean_resizing=False)
    return model


def ids(model):
    """Inputs that hold the last tokens of the vocabulary."""
    inputs = batch(model)
    inputs["input_ids"][:, 1:3] = model.config.vocab_size - 1 - torch.arange(2)
    return inputs


def check(folder, pruner, model):
    """`model`, a base, with the adapter of `folder` computes what `pruner.model` does, and so do compacted files."""
    inputs = ids(pruner.model)
    want = logits(pruner.model.eval(), inputs)
    flags = {n: p.requires_grad for n, p in pruner.model.named_parameters()}
    back = pk.load_adapter(model, folder / "a")
    assert difference(logits(back.model, inputs), want) <= NEAR
    assert {n: p.requires_grad for n, p in back.model.named_parameters()} == flags
    read = pk.load_adapter(load_base(folder / "base", folder / "a"), folder / "a")
    assert difference(logits(read.model, inputs), want) <= NEAR
    pk.compact_files(folder / "base", folder / "a", folder / "out")
    small = pk.compact(pruner.model)
    assert difference(logits(pk.load(folder / "out"), inputs), logits(small, inputs)) <= NEAR
    return back


# -- tokens that were added ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family,task", MODELS)
def test_rows_of_new_tokens_come_along(family, task, tied, tmp_path):
    """peft #1457: the adapter left them out, and a base resized anew has others."""
    model = with_tokens(based(tmp_path, family, task, tie_word_embeddings=tied))
    pruner = trained(model)
    pk.save_adapter(pruner, tmp_path / "a")
    fresh = type(model).from_pretrained(tmp_path / "base").eval()
    back = check(tmp_path, pruner, fresh)
    assert back.model.config.vocab_size == model.config.vocab_size
    check(tmp_path, pruner, with_tokens(type(model).from_pretrained(tmp_path / "base").eval(), seed=6))


def test_a_base_that_nobody_can_find(tmp_path):
    """Then fingerprints tell: the base resized anew is refused, as is one not resized."""
    pruner = trained(with_tokens(build("distilbert", "sequence")))
    pk.save_adapter(pruner, tmp_path / "a")
    anew = with_tokens(build("distilbert", "sequence"), seed=6)
    before = state(anew)
    with pytest.raises(ValueError, match=f"trained on another base model: '{WORDS}' has other.*save_embeddings"):
        pk.load_adapter(anew, tmp_path / "a")
    unchanged(anew, before)
    with pytest.raises(ValueError, match=rf"'{WORDS}' has shape \[53, 48\] there, \[50, 48\] here; where"):
        pk.load_adapter(build("distilbert", "sequence"), tmp_path / "a")
    anew.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"'{WORDS}' has other values there"):
        run_files(tmp_path)
    pk.save_adapter(pruner, tmp_path / "a", save_embeddings=True)
    check(tmp_path, pruner, anew)


def run_files(folder):
    return pk.compact_files(folder / "base", folder / "a", folder / "out")


def test_embeddings_are_written_where_they_must_be(tmp_path):
    pruner = trained(based(tmp_path))
    for choice, written in (("auto", False), (True, True), (False, False)):
        pk.save_adapter(pruner, tmp_path / "a", save_embeddings=choice)
        assert (WORDS in load_file(tmp_path / "a" / "adapter.safetensors")) is written
    with pytest.raises(ValueError, match=r"save_embeddings must be True, False or 'auto' \(got 'always'\)"):
        pk.save_adapter(pruner, tmp_path / "a", save_embeddings="always")
    pruner.model.config.name_or_path = "an-owner/no-such-model-anywhere"
    pk.save_adapter(pruner, tmp_path / "a")
    assert WORDS not in load_file(tmp_path / "a" / "adapter.safetensors")


# -- what the user trains, or does not -------------------------------------------------------------------------


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize(
    "family,task,thawed",
    [
        ("distilbert", "sequence", [WORDS, NORM, names("distilbert", 0)["q"] + ".bias"]),
        ("bert", "masked_lm", ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias"]),
        ("llama", "causal", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]),
        ("distilbert", "sequence", [UP + ".weight", names("distilbert", 0)["down"] + ".bias"]),
    ],
)
def test_what_was_made_trainable_comes_along(family, task, thawed, shrunk, tmp_path):
    targets = ["q_lin", "v_lin"] if thawed[0].endswith("lin1.weight") else None
    pruner = trained(
        based(tmp_path, family, task, **({"tie_word_embeddings": False} if family == "llama" else {})),
        **({"preset": None, "targets": targets} if targets else {}),
    )
    generator = torch.Generator().manual_seed(3)
    for name in thawed:
        parameter = pruner.model.get_parameter(name)
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if shrunk:
        pruner.finalize()
        pruner.shrink()
    pk.save_adapter(pruner, tmp_path / "a")
    assert set(thawed) <= set(load_file(tmp_path / "a" / "adapter.safetensors"))
    check(tmp_path, pruner, type(pruner.model).from_pretrained(tmp_path / "base").eval())


@pytest.mark.parametrize("family,task", MODELS)
def test_a_frozen_head_comes_along(family, task, tmp_path):
    """The head is new in most runs: frozen or not, no base has it."""
    pruner = trained(based(tmp_path, family, task))
    for name, parameter in pruner.model.named_parameters():
        if parameter.requires_grad and not name.endswith((".A", ".B", ".magnitude", ".logits")):
            parameter.requires_grad_(False)
    first = next(iter(pruner.layers.values()))
    first.A.requires_grad_(False)
    pk.save_adapter(pruner, tmp_path / "a")
    back = check(tmp_path, pruner, type(pruner.model).from_pretrained(tmp_path / "base").eval())
    assert not next(iter(back.layers.values())).A.requires_grad


def test_training_resumes_with_what_was_made_trainable(tmp_path):
    pruner = trained(based(tmp_path))
    with torch.no_grad():
        pruner.model.get_parameter(NORM).requires_grad_(True).add_(0.2)
    pk.save_adapter(pruner, tmp_path / "a")
    other = trained(type(pruner.model).from_pretrained(tmp_path / "base").eval())
    load_adapter_state(other, tmp_path / "a")
    assert other.model.get_parameter(NORM).requires_grad
    assert torch.equal(logits(other.model, batch(other.model)), logits(pruner.model, batch(pruner.model)))


# -- another base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize(
    "name", [WORDS, NORM, names("distilbert", 0)["q"] + ".bias", names("distilbert", 1)["up"] + ".weight"]
)
def test_a_frozen_tensor_of_another_base_is_refused_by_name(name, shrunk, tmp_path):
    """One number of it, in a row that is kept."""
    pruner = trained(based(tmp_path), preset=None, targets=["q_lin", "v_lin"])
    pruner.finalize()
    kept = pruner.plan().layers.get(name.rpartition(".")[0])
    row = 7 if kept is None else int(kept.rows[-1])
    if shrunk:
        pruner.shrink()
    pk.save_adapter(pruner, tmp_path / "a")
    other = type(pruner.model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        other.get_parameter(name)[row].add_(0.01)
    other.save_pretrained(tmp_path / "base")
    before = state(other)
    message = f"a: was trained on another base model: '{name}' has other values there than here"
    with pytest.raises(ValueError, match=message):
        pk.load_adapter(other, tmp_path / "a")
    unchanged(other, before)
    with pytest.raises(ValueError, match=message):
        run_files(tmp_path)
    assert not (tmp_path / "out").exists()


def test_resuming_on_another_base_is_refused(tmp_path):
    pk.save_adapter(trained(based(tmp_path)), tmp_path / "a")
    other = trained(type(build("distilbert", "sequence")).from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        other.model.get_parameter(WORDS)[7, 3] += 0.1
    with pytest.raises(ValueError, match=f"'{WORDS}' has other values there than here"):
        load_adapter_state(other, tmp_path / "a")


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rounding_makes_no_other_base(there, here, tmp_path):
    pk.save_adapter(trained(build("distilbert", "sequence", there)), tmp_path / "a")
    pk.load_adapter(build("distilbert", "sequence", here), tmp_path / "a")


def test_folders_of_before_load(tmp_path):
    pruner = trained(based(tmp_path))
    pk.save_adapter(pruner, tmp_path / "a")
    old = ("fingerprints", "frozen", "thawed")
    edit_json(tmp_path / "a" / "adapter_config.json", lambda config: [config.pop(name) for name in old])
    check(tmp_path, pruner, type(pruner.model).from_pretrained(tmp_path / "base").eval())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"fingerprints": 3}, "fingerprints must hold shape, dtype, squares and crc by tensor name"),
        ({"fingerprints": {"x": {"shape": [1]}}}, "fingerprints must hold shape"),
        ({"frozen": 3}, r"frozen must be a list of parameter names \(got 3\)"),
        ({"thawed": {}}, "thawed must be a list of parameter names"),
    ],
)
def test_edited_fields(change, message, tmp_path):
    pk.save_adapter(trained(build("distilbert", "sequence")), tmp_path / "a")
    edit_json(tmp_path / "a" / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        pk.load_adapter(build("distilbert", "sequence"), tmp_path / "a")


def test_a_tensor_that_the_model_has_not(tmp_path):
    pk.save_adapter(trained(build("distilbert", "sequence")), tmp_path / "a")
    file = tmp_path / "a" / "adapter.safetensors"
    save_file(load_file(file) | {"distilbert.embeddings.stranger": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="tensor 'distilbert.embeddings.stranger' is not of this model"):
        pk.load_adapter(build("distilbert", "sequence"), tmp_path / "a")
