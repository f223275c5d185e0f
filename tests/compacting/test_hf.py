"""After `import prunekern.hf` every AutoModelFor... loads compact models; without it, transformers refuses."""

import json
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import prunekern as pk
import prunekern.hf  # noqa: F401  (registers the format)
from tests.helpers.tiny_models import (
    CLASSES,
    FAMILIES,
    HIDDEN,
    attached,
    batch,
    build,
    difference,
    logits,
    names,
    prune,
)

AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "masked_lm": AutoModelForMaskedLM,
    "base": AutoModel,
}


def saved(folder, family="distilbert", task="sequence", share=0.5, **options):
    model = build(family, task, **options)
    prune(attached(model), share)
    small = pk.compact(model)
    pk.save(small, folder)
    return small


@pytest.mark.parametrize("task", AUTO)
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes(family, task, tmp_path):
    small = saved(tmp_path / "m", family, task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = AUTO[task].from_pretrained(tmp_path / "m")
    assert type(back) is CLASSES[family, task]
    assert torch.equal(logits(back, batch()), logits(small, batch()))
    assert pk.plan(back) == pk.plan(small)
    assert AutoConfig.from_pretrained(tmp_path / "m").model_type == family


def test_in_a_fresh_process_and_by_torch_dtype(tmp_path):
    for task in ("sequence", "token", "masked_lm"):
        small = saved(tmp_path / task, "roberta", task)
        torch.save(logits(small, batch()), tmp_path / f"{task}.pt")
        torch.save(batch(), tmp_path / "batch.pt")
    code = """
        import sys, torch
        import prunekern.hf
        import transformers as t
        torch.set_num_threads(1)
        inputs = torch.load(f"{sys.argv[1]}/batch.pt")
        autos = {"sequence": t.AutoModelForSequenceClassification, "token": t.AutoModelForTokenClassification}
        for task, auto in {**autos, "masked_lm": t.AutoModelForMaskedLM}.items():
            model = auto.from_pretrained(f"{sys.argv[1]}/{task}")
            with torch.no_grad():
                got = model(**inputs).logits
            assert torch.equal(got, torch.load(f"{sys.argv[1]}/{task}.pt")), task
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_refuses_loudly(family, tmp_path):
    saved(tmp_path / "m", family)
    code = """
        import sys
        from transformers import AutoModelForSequenceClassification
        assert "prunekern" not in sys.modules
        try:
            model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
        except Exception as error:
            print(type(error).__name__, error)
        else:
            raise SystemExit("loaded without prunekern")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_from_a_checkpoint_with_a_head_and_back(family, tmp_path):
    small = saved(tmp_path / "head", family)
    base = AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        want = small.base_model(**batch()).last_hidden_state
    assert type(base) is CLASSES[family, "base"]
    assert torch.equal(logits(base, batch()), want)
    pk.save(base, tmp_path / "base")
    plan = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]["plan"]
    assert set(plan["layers"]) == {n for i in range(2) for n in names(family, i, "base").values()}
    assert torch.equal(logits(pk.load(tmp_path / "base"), batch()), want)
    headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)  # a new head
    with torch.no_grad():
        assert torch.equal(headed.base_model(**batch()).last_hidden_state, want)
    assert set(pk.plan(headed).layers) == set(pk.plan(small).layers)
    pk.save(headed, tmp_path / "again")
    assert torch.equal(logits(pk.load(tmp_path / "again"), batch()), logits(headed, batch()))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_head_on_a_compact_body(family, tmp_path):
    small = saved(tmp_path / "m", family)
    token = AutoModelForTokenClassification.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        body = [m.base_model(**batch()).last_hidden_state for m in (small, token)]
    assert torch.equal(*body)


def test_masked_lm_stays_tied(tmp_path):
    for family in FAMILIES:
        saved(tmp_path / family, family, "masked_lm")
        back = AutoModelForMaskedLM.from_pretrained(tmp_path / family)
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float64}, {"dtype": "auto"}, {"device_map": "cpu"}, {"attn_implementation": "eager"}]
)
def test_options_of_from_pretrained(options, tmp_path):
    small = saved(tmp_path / "m", dtype=torch.float64)
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", **options)
    dtype = torch.float64 if "dtype" in options else None
    if dtype is not None:
        assert {p.dtype for p in back.parameters()} == {dtype}
        assert difference(logits(back, batch()), logits(small, batch())) <= 1e-12
    assert difference(logits(back, batch()), logits(small, batch())) <= 1e-5
    if "attn_implementation" in options:
        assert back.config._attn_implementation == "eager"


def test_16_bit_on_disk_is_loaded_as_asked(tmp_path):
    small = saved(tmp_path / "m")
    half = small.to(torch.bfloat16)
    pk.save(half, tmp_path / "half")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    up = pk.load(tmp_path / "half")
    assert all(torch.equal(a.float(), b) for a, b in zip(half.parameters(), up.parameters(), strict=True))


def test_loaded_model_is_an_ordinary_one(tmp_path):
    """Casts, copies, fine-tuning and the pipeline: nothing of a quantiser is left in the way."""
    saved(tmp_path / "m")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert back.hf_quantizer is None and not back.is_quantized
    want = logits(back, batch())
    assert difference(logits(back.double(), batch()), want) <= 1e-5
    assert difference(logits(back.float(), batch()), want) <= 1e-6
    back.train().requires_grad_(True)
    back(**batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    grad = back.get_submodule(names("distilbert")["up"]).weight.grad
    assert grad is not None and float(grad.abs().max()) > 0


def test_trainer_takes_a_loaded_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    saved(tmp_path / "m")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").requires_grad_(True)
    rows = [{k: v[i] for k, v in batch(8, padded=False).items()} | {"labels": i % 3} for i in range(8)]
    before = back.get_submodule(names("distilbert")["up"]).weight.detach().clone()
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
    )
    Trainer(back, arguments, train_dataset=rows).train()
    assert not torch.equal(back.get_submodule(names("distilbert")["up"]).weight, before)
    pk.save(back, tmp_path / "tuned")
    assert torch.equal(logits(pk.load(tmp_path / "tuned"), batch()), logits(back.eval(), batch()))


def test_pipeline(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]))
    saved(tmp_path / "m")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "m")
    out = pipeline("text-classification", str(tmp_path / "m"), device="cpu")("good film")
    assert out[0]["label"].startswith("LABEL_") and 0 < out[0]["score"] <= 1


# -- refusals by the loader ------------------------------------------------------------------------------------


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("auto", ["sequence", "base"])
def test_from_pretrained_names_what_does_not_fit(auto, tmp_path):
    folder = tmp_path / "m"
    saved(folder)
    whole = (folder / "config.json").read_text()
    up = names("distilbert")["up"].removeprefix("" if auto == "sequence" else "distilbert.")

    def refused(change, message):
        (folder / "config.json").write_text(whole)
        edit(folder, change)
        with pytest.raises(ValueError, match=message):
            AUTO[auto].from_pretrained(folder)

    refused(
        lambda c: c["quantization_config"].update(format=99), r"format 99 was written by prunekern .* Upgrade prunekern"
    )
    refused(
        lambda c: c["quantization_config"]["plan"]["layers"].popitem(),
        "is not in the plan; this plan is for another model",
    )
    refused(lambda c: c.update(hidden_dim=80), rf"layer '{up}' must be \[80, {HIDDEN}\]")
    (folder / "config.json").write_text(whole)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: is truncated"):
        AUTO[auto].from_pretrained(folder)


def test_plan_of_another_family(tmp_path):
    saved(tmp_path / "bert", "bert")
    saved(tmp_path / "m")
    theirs = json.loads((tmp_path / "bert" / "config.json").read_text())["quantization_config"]
    edit(tmp_path / "m", lambda c: c.update(quantization_config=theirs))
    with pytest.raises(ValueError, match="is not in the model; this plan is for another model"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")


def test_family_without_a_table(tmp_path):
    """A plan in the config of an architecture we do not know."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    saved(tmp_path / "m")
    theirs = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "g"
    )
    edit(tmp_path / "g", lambda c: c.update(quantization_config=theirs))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no family"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "g")
