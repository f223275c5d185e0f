"""Exports equal the compact model: ONNX files in ONNX Runtime and OpenVINO, and programs of torch.export."""

import logging
import sys

import numpy as np
import pytest
import torch
from transformers import DistilBertForMultipleChoice, DistilBertForQuestionAnswering
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prunekern as pk
from prunekern import _native
from prunekern.compacting import checkpoint
from prunekern.exporting.onnx import export_onnx
from prunekern.exporting.plain import is_compact, plain_twin
from prunekern.nn import CompactLinear
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.tiny_models import attached, difference, keep_only, prune, state, unchanged, watch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

TOLERANCE = 1e-4  # the promise: max |difference| of logits relative to max |logit|
EDGES, RUNTIMES = "edges", ("ONNX Runtime", "OpenVINO")
# (family, task, share removed or EDGES, changes of the config); every family, 0 % and 97 %, one window
CASES = (
    ("distilbert", "sequence", 0.3, {}),
    ("bert", "token", EDGES, {}),
    ("roberta", "masked_lm", 0.97, {}),
    ("llama", "causal", EDGES, {}),
    ("mistral", "causal", 0.3, {"sliding_window": 4}),
    ("qwen2", "causal", 0.0, {"tie_word_embeddings": True}),
    ("qwen3", "causal", 0.97, {}),
)


def home(family):
    """The module that builds models of a family."""
    return tiny_decoders if family in tiny_decoders.FAMILIES else tiny_models


def compacted(family, task, share, seed=1, **changes):
    model = home(family).build(family, task, layers=3 if share == EDGES else 1, **changes)
    pruner = attached(model)
    prune(pruner, 0.3 if share == EDGES else share, seed=seed)
    if share == EDGES:
        to_the_edges(pruner, home(family), task)
    return pk.compact(model)


def to_the_edges(pruner, of, task):
    """Layer 0: the first head has no query/key channel, the last is gone. Layer 1: no value and no FFN channel.
    Layer 2: no query/key channel at all, and down writes nothing.
    """
    kept = {name: (mask.logits.detach() > 0).numpy() for name, mask in pruner.masks.items()}
    family = () if of is tiny_decoders else ("bert",)
    names = [of.names(*family, layer, task) for layer in range(3)]
    heads = tiny_decoders.KV_HEADS if of is tiny_decoders else tiny_models.HEADS
    q, v = kept[names[0]["q"]], kept[names[0]["v"]]
    q[: q.size // heads], v[-v.size // heads :] = False, False
    for layer, what in ((1, "v"), (1, "up"), (2, "q"), (2, "down")):
        kept[names[layer][what]][:] = False
    keep_only(pruner, kept)


def feed_of(inputs, names):
    """What a runtime takes; token types are zeros."""
    arrays = {k: v.numpy() for k, v in inputs.items()}
    return {name: arrays[name] if name in arrays else np.zeros_like(arrays["input_ids"]) for name in names}


class Runtime:
    """path -> callable on a dict of arrays, giving a list of tensors."""

    def __init__(self, name, path):
        self.names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
        if name == "OpenVINO":
            # Its default on machines with AMX is bf16, which kills the process where tile palettes are hidden.
            options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
            model = openvino.Core().compile_model(str(path), "CPU", options)
            self.run = lambda feed: [np.array(array) for array in model(feed).values()]
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.run = lambda feed: session.run(None, feed)

    def __call__(self, inputs):
        return [torch.from_numpy(array) for array in self.run(feed_of(inputs, self.names))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """case -> (compact model, path), each exported once, which leaves the model as it was."""
    folder, made = tmp_path_factory.mktemp("onnx"), {}

    def get(case):
        key = CASES.index(case)
        if key not in made:
            family, task, share, changes = case
            small, path = compacted(family, task, share, **changes), folder / f"{key}.onnx"
            before, logits = state(small), small(**home(family).batch()).logits
            export_onnx(small, path)
            assert torch.equal(small(**home(family).batch()).logits, logits)
            unchanged(small, before)
            made[key] = small, path
        return made[key]

    return get


def named(case):
    return f"{case[0]}-{case[2]}"


# -- ONNX ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=named)
def test_onnx_equals_compact(case, exported):
    small, path = exported(case)
    for name in RUNTIMES:
        run = Runtime(name, path)
        for size, length, padded in ((1, 1, False), (1, 9, False), (4, 9, True), (2, 23, True)):
            inputs = home(case[0]).batch(size, length, padded)
            (got,) = run(inputs)
            want = small(**inputs).logits
            if got.dim() == 3:  # one a token
                read = inputs["attention_mask"].bool()
                got, want = got[read], want[read]
            assert difference(got, want) <= TOLERANCE, (name, size, length)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_onnx_is_of_plain_operators_and_free_axes(case, exported):
    small, path = exported(case)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    axes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    names = ["input_ids", "attention_mask"]
    if getattr(small.config, "type_vocab_size", 1) > 1:
        names.append("token_type_ids")
    assert axes == dict.fromkeys(names, ["batch", "length"])
    assert [o.name for o in model.graph.output] == ["logits"]
    assert [p.name for p in path.parent.glob(f"*{path.name}*")] == [path.name]  # weights inside, nothing left behind


def test_edges_are_edges(exported):
    layers = exported(CASES[1])[0].bert.encoder.layer
    first, second, third = (layer.attention.self for layer in layers)
    assert first.ragged.qk_first[:2] == (0, 0) and first.padded[0] == tiny_models.HEADS - 1
    assert second.padded[0] == 0 and layers[1].intermediate.dense.weight.shape[0] == 0
    assert third.query.weight.shape[0] == 0 and third.padded[0] > 0 and layers[2].output.dense.weight.shape[0] == 0
    first, second, third = (layer.self_attn.layout for layer in exported(CASES[3])[0].model.layers)
    assert first.kv == tiny_decoders.KV_HEADS - 1 and first.key_first[1] == 0
    assert second.kv == 0 and third.key_first[-1] == 0 and third.kv > 0


def test_token_types_are_read(exported):
    small, path = exported(CASES[1])
    inputs = tiny_models.batch(2, 9, padded=False)
    inputs["token_type_ids"] = (torch.arange(18).view(2, 9) % 9 > 4).long()
    want = small(**inputs).logits
    assert difference(Runtime("ONNX Runtime", path)(inputs)[0], want) <= TOLERANCE
    assert difference(small(**inputs | {"token_type_ids": None}).logits, want) > 10 * TOLERANCE


def test_cache_of_kept_channels(tmp_path):
    """A left-padded prompt, single tokens and several at once after it, equal to whole sequences; the second layer has
    no values.
    """
    model, path = tiny_decoders.build(), tmp_path / "past.onnx"
    pruner = prune(attached(model), 0.3)
    pruner.masks[tiny_decoders.names(1)["v"]].logits.data.fill_(-1.0)
    small = pk.compact(model)
    export_onnx(small, path, with_past=True)
    graph = onnx.load(path).graph
    widths = {i.name: i.type.tensor_type.shape.dim[3].dim_value for i in graph.input if i.name.startswith("past")}
    layouts = [layer.self_attn.layout for layer in small.model.layers]
    kept = [max(n, 1) for at in layouts for n in (at.key.numel(), at.value.numel())]
    assert list(widths.values()) == kept and kept[2:] == [1, 1]
    results = [o.name for o in graph.output]
    assert results == ["logits", *(name.replace("past_key_values", "present") for name in widths)]
    inputs = tiny_decoders.batch(3, 12)
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    want = small(**inputs).logits
    for name in RUNTIMES:
        run, at = Runtime(name, path), 0
        past = {key: torch.zeros(3, 1, 0, width) for key, width in widths.items()}
        for tokens in (7, 1, 1, 3):
            now = slice(at, at + tokens)
            step = {key: inputs[key][:, now] for key in ("input_ids", "position_ids")}
            got, *present = run(step | {"attention_mask": mask[:, : now.stop]} | past)
            read = mask[:, now].bool()
            assert difference(got[read], want[:, now][read]) <= TOLERANCE, (name, at)
            past, at = dict(zip(widths, present, strict=True)), now.stop


def test_base_model_newer_opset_weights_beside(tmp_path, monkeypatch):
    """Weights beside the graph, as above 2 GB, under the final name, together with an old file replaced."""
    monkeypatch.setattr("prunekern.exporting.onnx._INLINE", 0)
    small, path = compacted("distilbert", "base", 0.5), tmp_path / "base.onnx"
    path.write_text("old")
    export_onnx(small, str(path), opset=23)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.onnx", "base.onnx.data"]
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 23
    inputs = tiny_models.batch()
    for name in RUNTIMES:
        (got,) = Runtime(name, path)(inputs)
        assert difference(got, small(**inputs).last_hidden_state) <= TOLERANCE


# -- the plain twin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", checkpoint.WEIGHTS)
def test_twin_takes_weights_as_they_are_held(weights, tmp_path):
    """bf16, int8 and int4 of blocks and of a tied head, as fp32; what is fp32 is not copied."""
    pk.save(compacted("llama", "causal", 0.3, tie_word_embeddings=True), tmp_path / "small")
    small = pk.load(tmp_path / "small", weights=weights, activations="float")
    twin, inputs = plain_twin(small), tiny_decoders.batch(padded=False)
    assert not any(isinstance(m, CompactLinear) for m in twin.modules())
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    # Products of bf16 round their inputs, too: 2^-9 of each, in layers one after another.
    narrow = weights == "bf16" and _native.available() and _native.core().isa() in ("avx512_bf16", "amx")
    tolerance = 2.0**-9 * 4 * small.config.num_hidden_layers if narrow else TOLERANCE
    assert difference(twin(**inputs).logits, small(**inputs).logits) <= tolerance
    assert twin.model.embed_tokens.weight.data_ptr() == small.model.embed_tokens.weight.data_ptr()
    if weights == "fp32":
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_twin_of_eager_attention_other_dtype_and_hooks():
    small = compacted("roberta", "sequence", 0.3, attention="eager").double()
    small.requires_grad_(True)
    small.roberta.encoder.layer[0].register_forward_hook(lambda *_: pytest.fail("a hook came along"))
    twin, inputs = plain_twin(small), tiny_models.batch()
    assert not any(p.requires_grad for p in twin.parameters()) and twin.dtype == torch.float32
    assert small.config._attn_implementation == "eager" and all(p.requires_grad for p in small.parameters())
    small.roberta.encoder.layer[0]._forward_hooks.clear()
    small.requires_grad_(False)
    assert difference(twin(**inputs).logits, small(**inputs).logits) <= TOLERANCE


def test_twin_gives_every_answer_of_a_head():
    model = DistilBertForQuestionAnswering(tiny_models.config("distilbert", layers=1, num_labels=2)).eval()
    prune(attached(model), 0.3)
    small, inputs = pk.compact(model), tiny_models.batch()
    got, want = plain_twin(small)(**inputs), small(**inputs)
    for name in ("start_logits", "end_logits"):
        assert difference(got[name], want[name]) <= TOLERANCE


# -- torch.export ------------------------------------------------------------------------------------------------


def program_of(model, inputs):
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, free), strict=False)
    return program, {str(node.target) for node in program.graph.nodes if "prunekern" in str(node.target)}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_torch_export_of_compact_encoders(family):
    """Free batch and length; ops of prunekern's, on plain weights."""
    small = compacted(family, "sequence", 0.3)
    program, ours = program_of(small, tiny_models.batch())
    assert ours == {"prunekern.compact_linear.default"}
    assert {name for name, _ in small.named_parameters()} == set(program.state_dict)
    for size, length in ((1, 1), (4, 9), (2, 23)):
        inputs = tiny_models.batch(size, length, padded=length > 2)
        assert difference(program.module()(**inputs).logits, small(**inputs).logits) <= TOLERANCE


def test_torch_export_of_a_twin(tmp_path):
    """Operators of PyTorch's own, through a file."""
    small, inputs = compacted("distilbert", "sequence", 0.3), tiny_models.batch(2, 17)
    program, ours = program_of(plain_twin(small), tiny_models.batch())
    assert not ours
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert difference(loaded(**inputs).logits, small(**inputs).logits) <= TOLERANCE


# -- nothing else changes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", (("bert", "token", 0.3, {}), ("llama", "causal", 0.3, {})), ids=named)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_alone(case, fails, tmp_path, monkeypatch):
    """The same parameters, packed weights and kernels, bitwise the same answer; also after an export that failed."""
    family, task, share, _ = case
    small, inputs = compacted(family, task, share), home(family).batch()
    calls = watch(monkeypatch)
    before, logits, kernels = state(small), small(**inputs).logits, [*calls]
    packed = {name: m._packed for name, m in small.named_modules() if hasattr(m, "_packed")}
    interfaces, quiet = dict(ALL_ATTENTION_FUNCTIONS), logging.root.manager.disable

    def export(run, args, path, **_):
        run(*args)
        path.write_text("half")
        if fails:
            raise OSError("disk full")

    monkeypatch.setattr(torch.onnx, "export", export)
    path = tmp_path / "model.onnx"
    path.write_text("old")
    if fails:
        with pytest.raises(OSError, match="disk full"):
            export_onnx(small, path)
    else:
        export_onnx(small, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == ("old" if fails else "half")
    calls.clear()
    assert torch.equal(small(**inputs).logits, logits) and calls == kernels
    unchanged(small, before)
    assert all(small.get_submodule(name)._packed is p for name, p in packed.items())
    assert dict(ALL_ATTENTION_FUNCTIONS) == interfaces and logging.root.manager.disable == quiet


# -- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    dense, small = tiny_models.build(layers=1), compacted("distilbert", "sequence", 0.3)
    for model in (dense, attached(tiny_models.build(layers=1)).model, torch.nn.Linear(2, 2)):
        assert not is_compact(model)
        with pytest.raises(ValueError, match=r"not compact \(.*call prunekern.compact"):
            export_onnx(model, path)
        with pytest.raises(ValueError, match="plain_twin: model is not compact"):
            plain_twin(model)
    for opset in (17, 24, "18", True, 18.0):
        with pytest.raises(ValueError, match="opset must be 18 to 23"):
            export_onnx(small, path, opset=opset)
    with pytest.raises(ValueError, match="with_past needs a causal language model .*DistilBert"):
        export_onnx(small, path, with_past=True)
    with pytest.raises(FileNotFoundError, match="missing: no such folder to write model.onnx to"):
        export_onnx(small, tmp_path / "missing" / "model.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_onnx(small, tmp_path)
    for name in ("onnx", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ImportError, match=r"needs onnx and onnxscript \(.*: pip install 'prunekern\[onnx\]'"):
                export_onnx(small, path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path):
    path = tmp_path / "model.onnx"
    choices = DistilBertForMultipleChoice(tiny_models.config("distilbert", layers=1))
    attached(choices)
    with pytest.raises(ValueError, match=r"input_ids \[batch, length\] \(got DistilBertForMultipleChoice\)"):
        export_onnx(pk.compact(choices), path)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rope_type must be one of default, .* 'dynamic'"):
        export_onnx(compacted("llama", "causal", 0.3, rope_parameters=rope), path)
    with pytest.raises(ValueError, match="with_past needs a causal language model .*LlamaModel"):
        export_onnx(compacted("llama", "base", 0.3), path, with_past=True)
    assert not list(tmp_path.iterdir())
