"""`calibrate`: what layers lose, what is held therefore, and that save, load and transformers keep to it."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import prunekern as pk
from prunekern.compacting.checkpoint import set_weights
from prunekern.compacting.head import word_head
from prunekern.ops.packing import quantize_weight
from prunekern.ops.quantized import quantize_rows
from tests.helpers import tiny_decoders
from tests.helpers.compact_folders import python, small_model
from tests.helpers.tiny_models import attached, batch, build, logits, names, prune

Q, K, V, OUT, UP, DOWN = names("distilbert").values()
NOTHING, ALL = -1000.0, 1000.0  # dB that every layer reaches, or none


@pytest.fixture
def small():
    return small_model()


def decoder(family="llama", **options):
    model = tiny_decoders.build(family, **options)
    prune(attached(model), 0.3)
    return pk.compact(model)


def kinds(model):
    return {name: m.weights for name, m in model.named_modules() if isinstance(m, pk.nn.CompactLinear)}


def batches(count=3, make=batch):
    return [make(seed=i) for i in range(count)]


def coarse(small, layer, before):
    """Make `layer` one that int8 suits badly: the heaviest weight of every channel meets an input that is always zero,
    as `before`, which makes the input, sees to; the others round to nothing beside it.
    """
    feeder = small.get_submodule(before)
    with torch.no_grad():
        small.get_submodule(layer).weight[:, 0] = 1000.0
        feeder.weight[0] = 0.0
        if getattr(feeder, "bias", None) is not None:
            feeder.bias[0] = 0.0


BEFORE = {
    **dict.fromkeys((Q, K, V), "distilbert.embeddings.LayerNorm"),
    OUT: V,
    UP: "distilbert.transformer.layer.0.sa_layer_norm",
    DOWN: UP,
}


# -- what is measured ------------------------------------------------------------------------------------------


def by_definition(layer, x, activations):
    """dB of a layer on rows x [rows, K], in float64 from the rounded numbers."""
    w = layer.weight.double()
    q, scale = quantize_weight(layer.weight)
    near = q.double() * scale.double()[:, None]
    rows, by = quantize_rows(x)
    rounded = x.double() if activations == "float" else rows.double() * by.double()
    y, noise = x.double() @ w.T, rounded @ near.T - x.double() @ w.T
    return float((10 * (y.square().sum(1) / noise.square().sum(1)).log10()).mean())


@pytest.mark.parametrize("activations", ["auto", "float"])
def test_db_is_that_of_the_definition(activations, small):
    seen, layer = [], small.get_submodule(Q)
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    inputs = batches()
    for one in inputs:
        logits(small, one)
    handle.remove()
    x = torch.cat([x[one["attention_mask"].bool()] for x, one in zip(seen, inputs, strict=True)])
    want = by_definition(layer, x, activations)
    report = pk.calibrate(small, inputs, NOTHING, activations=activations)
    got = next(loss for loss in report.layers if loss.name == Q)
    assert got.db == pytest.approx(want, abs=0.01) and 25 < got.db < 60
    assert got.held == "int8" and got.held_db == got.db and report.rows == len(x)


def test_padding_is_not_measured(small):
    """Its embeddings are zero but for positions: it would count as tokens do."""
    whole = batch(4, padded=False)
    cut = {name: t[:, :5] for name, t in whole.items()}
    padded = {"input_ids": whole["input_ids"].clone(), "attention_mask": whole["attention_mask"].clone()}
    padded["attention_mask"][:, 5:] = 0
    padded["input_ids"][:, 5:] = 1
    got = [pk.calibrate(small_model(), [one]).layers for one in (cut, padded)]
    for a, b in zip(*got, strict=True):
        assert a.db == pytest.approx(b.db, abs=0.02), a.name


def test_at_most_so_many_rows(small):
    used = []

    def endless():
        while True:
            used.append(1)
            yield batch(4, padded=False)  # 36 rows

    report = pk.calibrate(small, endless(), most_rows=50)
    assert report.rows == 50 and len(used) == 2


def test_blocks_of_rows_change_nothing(small, monkeypatch):
    whole = pk.calibrate(small_model(), batches()).layers
    monkeypatch.setattr("prunekern.compacting.losing.BLOCK", 200)
    for a, b in zip(whole, pk.calibrate(small, batches()).layers, strict=True):
        assert a.db == pytest.approx(b.db, abs=1e-3)


def test_encodings_that_are_lists_or_one_text(small):
    lists = {name: t.tolist() for name, t in batch(padded=False).items()} | {"labels": [0, 1, 2, 0]}
    one = {name: t[0].tolist() for name, t in batch(padded=False).items()}
    assert pk.calibrate(small_model(), [lists]).rows == 36 and pk.calibrate(small, [one]).rows == 9


# -- what is held ----------------------------------------------------------------------------------------------


def test_a_layer_that_loses_too_much_is_held_in_more_bits(small):
    coarse(small, OUT, BEFORE[OUT])
    report = pk.calibrate(small, batches(), least_db=20.0)
    assert report.held == {OUT: "bf16"} == {n: k for n, k in kinds(small).items() if k != "int8"}
    loss = next(x for x in report.layers if x.name == OUT)
    assert loss.db < report.least_db <= loss.held_db
    assert f"{OUT}" in str(report) and f"bf16 ({loss.held_db:.1f} dB)" in str(report)
    assert "1 of 12 layers are held in more bits than int8" in str(report)


def test_fp32_where_nothing_less_will_do(small):
    report = pk.calibrate(small, batches(), ALL)
    assert set(report.held.values()) == {"fp32"} == set(kinds(small).values()) and len(report.held) == 12
    assert all(loss.held_db == math.inf for loss in report.layers)


@pytest.mark.parametrize("odd", [(Q, K, V), (UP, DOWN)])
def test_what_runs_as_one_is_held_alike(odd, small):
    coarse(small, odd[-1], BEFORE[odd[-1]])
    report = pk.calibrate(small, batches(), least_db=20.0)
    assert set(report.held) == set(odd)


def test_gate_up_and_down_are_held_alike():
    small, mlp = decoder(), [tiny_decoders.names()[k] for k in ("gate", "up", "down")]
    coarse(small, mlp[0], "model.layers.0.post_attention_layernorm")
    report = pk.calibrate(small, batches(make=tiny_decoders.batch), least_db=20.0)
    assert set(report.held) == set(mlp)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_has_a_choice_of_its_own(tied, tmp_path):
    small = decoder(tie_word_embeddings=tied)
    inputs = batches(make=tiny_decoders.batch)
    db = pk.calibrate(copy.deepcopy(small), inputs, NOTHING).layers[-1].db
    report = pk.calibrate(small, inputs, least_db=db + 0.1)
    assert report.layers[-1].name == "lm_head" and report.held["lm_head"] == "bf16"
    assert word_head(small).weights == "bf16"
    pk.save(small, tmp_path / "m")
    back = pk.load(tmp_path / "m", weights="int8")
    assert kinds(back) == kinds(small)
    inputs = tiny_decoders.batch()
    assert torch.equal(logits(back, inputs), logits(small, inputs))
    assert word_head(set_weights(back, "fp32")).weights == "fp32"


def test_heads_without_channels_are_left_alone():
    small = small_model(share=1.0)
    report = pk.calibrate(small, batches())
    assert not report.held and report.rows == 0 and {loss.db for loss in report.layers} == {math.inf}
    assert "inf" in str(report)


def test_the_answers_are_those_of_the_kinds(small):
    """Calibrating sets what `set_weights` sets: the same numbers, and near those of fp32."""
    want, twin = logits(small, batch()), small_model()
    coarse_free = pk.calibrate(small, batches(), NOTHING)
    assert not coarse_free.held
    assert torch.equal(logits(small, batch()), logits(set_weights(twin, "int8"), batch()))
    error = (logits(small, batch()) - want).norm() / want.norm()
    assert error < 0.05


# -- on disk ---------------------------------------------------------------------------------------------------


def held_in_the_middle(small):
    """Calibrated so that some layers are held in more bits and some are not."""
    coarse(small, V, BEFORE[V])
    return pk.calibrate(small, batches(), least_db=20.0)


def test_saved_and_followed(small, tmp_path):
    report = held_in_the_middle(small)
    pk.save(small, tmp_path / "m")
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert section["format"] == 2 and section["held"]["layers"] == report.held
    assert (section["held"]["weights"], section["held"]["least_db"]) == ("int8", 20.0)
    back = pk.load(tmp_path / "m", weights="int8")
    assert kinds(back) == kinds(small) and back.config.quantization_config == small.config.quantization_config
    assert torch.equal(logits(back, batch()), logits(small, batch()))
    assert set(kinds(pk.load(tmp_path / "m")).values()) == {"fp32"}  # nobody asked for fewer bits
    assert set(kinds(pk.load(tmp_path / "m", weights="bf16")).values()) == {"bf16"}
    rounded = pk.load(tmp_path / "m", weights="int8", activations="int8")
    assert rounded.get_submodule(Q).activations == "auto" and rounded.get_submodule(OUT).activations == "int8"
    pk.save(back, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["held"] == section["held"]


def test_followed_in_a_fresh_process(small, tmp_path):
    held_in_the_middle(small)
    pk.save(small, tmp_path / "m")
    torch.save(logits(small, batch()), tmp_path / "want.pt")
    python(
        """
        import torch, prunekern as pk
        torch.set_num_threads(1)
        from tests.helpers.tiny_models import batch, logits
        small = pk.load(f"{sys.argv[1]}/m", weights="int8")
        assert torch.equal(logits(small, batch()), torch.load(f"{sys.argv[1]}/want.pt"))
        """,
        tmp_path,
    )


def test_what_is_not_calibrated_is_written_as_before(small, tmp_path):
    pk.save(small, tmp_path / "m")
    section = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert section["format"] == 1 and "held" not in section
    section.pop("heads")  # as the first versions wrote it
    assert set(section) == {"quant_method", "format", "prunekern_version", "plan"}


def test_transformers_keeps_it(small, tmp_path):
    report = held_in_the_middle(small)
    pk.save(small, tmp_path / "m")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert set(kinds(back).values()) == {"fp32"}
    back.save_pretrained(tmp_path / "again")
    assert kinds(pk.load(tmp_path / "again", weights="int8")) == kinds(small)
    base = AutoModel.from_pretrained(tmp_path / "again")  # its layers have other names
    pk.save(base, tmp_path / "base")
    want = {name.removeprefix("distilbert."): kind for name, kind in report.held.items()}
    assert {n: k for n, k in kinds(pk.load(tmp_path / "base", weights="int8")).items() if k != "int8"} == want


def test_a_base_model_carries_the_choice_for_the_head(tmp_path):
    small = decoder(tie_word_embeddings=False)
    coarse(small, "lm_head", "model.norm")
    pk.calibrate(small, batches(make=tiny_decoders.batch), least_db=20.0)
    pk.save(small, tmp_path / "m")
    AutoModel.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert word_head(set_weights(again, "int8")).weights == "bf16"


def test_the_card_says_so(small, tmp_path):
    report = held_in_the_middle(small)
    pk.save(small, tmp_path / "m", command="x")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Calibrated for `int8` weights, at least 20 dB in every layer" in card
    assert all(f"| `{name}` | bf16 |" in card for name in report.held)


def test_calibrated_again(small, tmp_path):
    held_in_the_middle(small)
    with pytest.raises(ValueError, match=r"calibrate: small must be in fp32 \(got torch.* in .*weights='fp32'"):
        pk.calibrate(small, batches())
    pk.save(small_model(), tmp_path / "m")
    back = pk.load(tmp_path / "m")
    pk.calibrate(back, batches(), ALL)
    back = pk.load(tmp_path / "m")
    assert not pk.calibrate(back, batches(), NOTHING).held and set(kinds(back).values()) == {"int8"}


# -- what is refused -------------------------------------------------------------------------------------------


def edited(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    return folder


CHANGES = {
    "another layer": (
        lambda s: s["held"]["layers"].update({"distilbert.transformer.layer.9.ffn.lin1": "bf16"}),
        r"held: layer 'distilbert.transformer.layer.9.ffn.lin1' is not in the plan",
    ),
    "another plan": (lambda s: s["held"].update(plan="0" * 16), r"held: plan must be '.*\(got '0000000000000000'\)"),
    "a kind": (lambda s: s["held"]["layers"].update({Q: "fp8"}), rf"held: layer '{Q}' must be one of .*got 'fp8'"),
    "a head": (lambda s: s["held"].update(head=3), r"held: head must be one of .*\(got 3\)"),
    "activations": (lambda s: s["held"].update(activations="fp8"), r"held: activations must be one of"),
    "least_db": (lambda s: s["held"].update(least_db="20"), r"held: least_db must be a finite number \(got '20'\)"),
    "no mapping": (lambda s: s.update(held=[1]), r"held: must be a mapping with weights, .*\(got list\)"),
    "fields": (lambda s: s["held"].pop("plan"), r"held: must be a mapping with .*plan \(got \["),
    "a newer format": (lambda s: s.update(format=4), r"format 4 was written by prunekern .*reads up to 3"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_files_that_do_not_fit_are_refused(what, small, tmp_path):
    held_in_the_middle(small)
    pk.save(small, tmp_path / "m")
    change, message = CHANGES[what]
    folder = edited(tmp_path / "m", change)
    for load in (lambda: pk.load(folder, weights="int8"), lambda: AutoModel.from_pretrained(folder)):
        with pytest.raises(ValueError, match=message):
            load()


def test_a_choice_for_the_same_layers_with_other_channels_is_refused(small, tmp_path):
    held_in_the_middle(small)
    choice, other = small.config.quantization_config.to_dict()["held"], small_model(share=0.2)
    pk.save(other, tmp_path / "m")
    edited(tmp_path / "m", lambda s: s.update(held=choice, format=2))
    with pytest.raises(ValueError, match="other channels were kept where the choice was made; calibrate this model"):
        pk.load(tmp_path / "m", weights="int8")


def test_arguments_are_refused_by_name(small):
    def refused(error, message, model=small, **options):
        with pytest.raises(error, match=message):
            pk.calibrate(model, **{"batches": batches()} | options)

    refused(ValueError, "no masked layers; call prunekern.attach", model=build())
    refused(ValueError, r"calibrate: weights must be one of .*\(got 'fp8'\)", weights="fp8")
    refused(ValueError, r"calibrate: weights must be one of bf16, int8.*\(got 'fp32'\)", weights="fp32")
    refused(ValueError, r"calibrate: activations must be one of .*\(got 'bf16'\)", activations="bf16")
    refused(ValueError, r"calibrate: activations must be auto or float with bf16", weights="bf16", activations="int8")
    refused(ValueError, r"calibrate: least_db must be a finite number of dB \(got nan\)", least_db=math.nan)
    refused(ValueError, r"calibrate: most_rows must be a positive whole number \(got 0\)", most_rows=0)
    refused(ValueError, "calibrate: batches must hold at least one batch", batches=[])
    refused(TypeError, r"calibrate: batches must be mappings of tensors \(got Tensor\)", batches=[torch.ones(1, 3)])
    refused(
        ValueError, "calibrate: batches must be of tensors, or lists of equal", batches=[{"input_ids": [[5], [5, 6]]}]
    )
    refused(ValueError, r"calibrate: small must be in fp32 \(got torch.float64", model=small_model(dtype=torch.float64))
    assert set(kinds(small).values()) == {"fp32"} and small.config.quantization_config.held is None


def test_infinities_are_refused_and_nothing_is_left_behind(small):
    small.get_submodule(UP).bias.data[0] = math.inf
    small.train()
    with pytest.raises(ValueError, match=rf"batches must make finite numbers \(layer '{DOWN}' reads NaN or infinity\)"):
        pk.calibrate(small, batches())
    assert not any(m._forward_pre_hooks for m in small.modules())
    assert small.training and set(kinds(small).values()) == {"fp32"}
    assert small.config.quantization_config.held is None
