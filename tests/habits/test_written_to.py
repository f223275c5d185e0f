"""Weights written past PyTorch's version counter: EMA, weight surgery, optimisers of old. The answer is that of the
weights the module holds, and so is what `compact` and `save` write.

The idioms are those of torch_ema (`copy_to`) and Torch-Pruning (`layer.weight.data = ...`).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunekern as pk
from prunekern.compacting import checkpoint
from prunekern.compacting.head import Rounded
from prunekern.nn import CompactAttention, CompactLinear, CompactMLP
from prunekern.ops import seen
from prunekern.ops.compact_linear import compact_linear_reference
from tests.helpers import tiny_decoders, tiny_models
from tests.helpers.compact_linears import native
from tests.helpers.masked_dora import close, definition, trained

ROWS, COLS = 129, 77


def all_halved(p):
    p.data.mul_(0.5)


def averaged(p):
    p.data.copy_(0.9 * p.data + 0.1 * torch.ones_like(p.data))


def one_row(p):
    p.data[p.shape[0] // 2] = 0.7


def one_column(p):
    p.data[..., p.shape[-1] // 3] = 0.7


def one_value(p):
    p.data.view(-1)[-2] = 7.0


def through_numpy(p):
    p.numpy()[p.shape[0] // 3] = 0.7


def assigned(p):
    p.data = p.data * 1.5


def swapped_with_a_copy(p):
    backup = p.data.clone()
    p.data = backup + 0.25


WRITES = (all_halved, averaged, one_row, one_column, one_value, through_numpy, assigned, swapped_with_a_copy)
NOT_NUMPY = tuple(write for write in WRITES if write is not through_numpy)  # which knows no bf16


def layer_of(kind):
    torch.manual_seed(0)
    return CompactLinear(torch.randn(ROWS, COLS), torch.randn(ROWS), weights=kind)


def written_out(layer, x):
    return compact_linear_reference(
        x, layer.weight, layer.bias, layer.in_index, layer.out_index, layer.out_features, "none", None, layer.scale
    )


@pytest.fixture(autouse=True)
def few_graphs():
    """Every layer of these tests is a graph of its own, and dynamo keeps eight of one function."""
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("write", "kind"), [*((w, "fp32") for w in WRITES), *((w, "bf16") for w in NOT_NUMPY)])
def test_a_layer_answers_with_what_it_holds(write, kind, compiled):
    # x in bf16 already: where the CPU multiplies bf16 by bf16 it is rounded to it, and the reference does not round.
    layer, x = layer_of(kind).pack(), torch.randn(5, COLS).bfloat16().float()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    before = call(x)
    for parameter in (layer.weight, layer.bias):
        write(parameter)
        want = written_out(layer, x)
        assert (want - before).abs().max() > 0.01  # a stale weight would be seen
        torch.testing.assert_close(call(x), want, rtol=1e-4, atol=1e-4)
        before = want


@native
def test_an_alias_that_stays_may_write_later():
    layer, x = layer_of("fp32"), torch.randn(5, COLS)
    layer(x)
    alias = layer.weight.data
    for row in (3, 50, 128):
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)
        alias[row] = float(row)  # unseen but for its values: one of every row is looked at
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)
    del alias
    layer.weight.data.neg_()
    layer(x)
    assert layer._packed.seen[6] == seen.FEW  # and no longer than it must be


@native
def test_weights_made_under_inference_mode_count_nothing_and_are_looked_at():
    with torch.inference_mode():
        layer, x = layer_of("fp32"), torch.randn(5, COLS)
        layer(x)
        layer.weight[7] = 3.0
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)
        layer.weight[:, 7] = 3.0
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-4, atol=1e-4)


@native
def test_reading_a_weight_costs_one_packing_and_copies_stay_ordinary():
    layer, x = layer_of("fp32"), torch.randn(5, COLS)
    layer(x)
    first = layer._packed
    layer(x), layer.state_dict(), copy.deepcopy(layer), repr(layer)
    assert layer(x) is not None and layer._packed is first  # nobody could have written
    float(layer.weight.data.norm())
    layer(x)
    assert layer._packed is not first
    twin = copy.deepcopy(layer)
    twin.weight.data.zero_()
    assert torch.equal(twin(x), twin.bias.expand(5, -1)) and layer(x).abs().max() > 1
    assert isinstance(layer.weight, nn.Parameter) and type(layer.weight * 1) is torch.Tensor


@pytest.mark.parametrize("write", [all_halved, averaged, one_row, one_column])
def test_layers_that_run_together(write):
    torch.manual_seed(0)
    mlp = CompactMLP(*(CompactLinear(torch.randn(64, 64) / 8, torch.randn(64)) for _ in range(3)), activation="silu")
    x = torch.randn(3, 9, 64)
    q, k, v = (CompactLinear(torch.randn(64, 64) / 8, torch.randn(64)) for _ in range(3))
    attention = CompactAttention((0, 32, 64), (0, 32, 64), 0.2)
    for layer in (mlp.up, mlp.gate, mlp.down):
        mlp(x)
        write(layer.weight), write(layer.bias)
        torch.testing.assert_close(mlp(x), copy.deepcopy(mlp)(x), rtol=1e-5, atol=1e-5)
    for layer in (q, k, v):
        attention(x, (q, k, v))
        write(layer.weight), write(layer.bias)
        fresh = copy.deepcopy(attention)(x, tuple(copy.deepcopy(p) for p in (q, k, v)))
        torch.testing.assert_close(attention(x, (q, k, v)), fresh, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@torch.no_grad()
def test_a_compact_model_follows_an_average_of_its_weights(family, kind):
    """Of exponential moving averages as torch_ema's `copy_to` writes them."""
    tiny = tiny_decoders if family == "llama" else tiny_models
    model = tiny.build(family)
    tiny_models.prune(tiny_models.attached(model), 0.3)
    small, inputs = pk.compact(model), tiny.batch()
    checkpoint.set_weights(small, kind)
    small.eval()
    small(**inputs)
    for p in small.parameters():
        p.data.mul_(0.5)
    want = copy.deepcopy(small)(**inputs).logits  # packs its own
    assert torch.equal(small(**inputs).logits, want)
    if family == "llama":  # decoding too, whose blocks are one call
        ids = inputs["input_ids"][:1, :4]
        small.generate(ids, max_new_tokens=4, do_sample=False)
        for p in small.parameters():
            p.data.mul_(-0.8)
        twin = copy.deepcopy(small).generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(small.generate(ids, max_new_tokens=4, do_sample=False), twin)


@pytest.mark.parametrize("norm_grad", ["detached", "full"])
@pytest.mark.parametrize("name", ["weight", "A", "B"])
@pytest.mark.parametrize("write", [all_halved, averaged, one_row, one_column, one_value])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_masked_layer_has_the_norm_of_what_it_holds(write, name, norm_grad, compiled):
    torch.manual_seed(0)
    layer = trained(masked=True, norm_grad=norm_grad).eval()
    x = torch.randn(5, layer.in_features)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    call(x)
    write(getattr(layer, name))
    close(call(x), definition(layer, x, layer.mask.kept().double()), torch.float32)


def test_what_compact_and_save_write_is_computed_afresh(tmp_path):
    model = tiny_models.build("distilbert")
    pruner = tiny_models.attached(model)
    tiny_models.prune(pruner, 0.3)
    model.eval()
    inputs = tiny_models.batch()
    model(**inputs)  # every norm is cached
    for layer in pruner.layers.values():
        for p in (layer.weight, layer.A, layer.B, layer.magnitude):
            p.data.add_(0.05 * torch.randn(p.shape))
    want = model(**inputs).logits
    small = pk.compact(model)
    torch.testing.assert_close(small(**inputs).logits, want, rtol=1e-4, atol=1e-4)
    exact = tiny_models.logits(tiny_models.reference(model), inputs)
    torch.testing.assert_close(want.double(), exact.double(), rtol=1e-3, atol=1e-4)
    for p in small.parameters():
        p.data.mul_(0.9)
    pk.save(small, tmp_path / "small")
    torch.testing.assert_close(
        pk.load(tmp_path / "small")(**inputs).logits, copy.deepcopy(small)(**inputs).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@torch.no_grad()
def test_a_tied_head_in_fewer_bits_follows_its_embeddings(kind, tmp_path):
    model = tiny_decoders.build("llama", tie_word_embeddings=True)
    tiny_models.prune(tiny_models.attached(model), 0.3)
    pk.save(pk.compact(model), tmp_path)
    small, inputs = pk.load(tmp_path, weights=kind), tiny_decoders.batch()
    for twin in (small, copy.deepcopy(small)):
        before = twin(**inputs).logits
        embeddings = twin.get_input_embeddings().weight
        embeddings.data[7] = 3 * embeddings.data[7] + 1  # a token surgery
        head = twin.get_output_embeddings()
        after = twin(**inputs).logits
        hidden = twin.model(**inputs).last_hidden_state
        exact = hidden @ embeddings.T
        if kind == "bf16":  # both sides are rounded, by half a step of 2^-8 each
            bound = (hidden.abs() @ embeddings.abs().T) * 2.0**-7.99
        else:  # both by half a step of the largest / 127
            bound = hidden.abs().sum(-1, keepdim=True) * embeddings.abs().amax(1) / 254
            bound = bound + hidden.abs().amax(-1, keepdim=True) * embeddings.abs().sum(1) / 254 * 1.01
        assert ((after - exact).abs() <= bound + 1e-5).all() and (after - before).abs().max() > 0.1
        assert head is twin.get_output_embeddings() and head.weights == kind


@pytest.mark.parametrize("family", ["distilbert", "bert", "llama"])
@torch.no_grad()
def test_another_scale_of_the_logits_counts(family):
    tiny = tiny_decoders if family == "llama" else tiny_models
    model = tiny.build(family)
    tiny_models.prune(tiny_models.attached(model), 0.3)
    small, inputs = pk.compact(model).eval(), tiny.batch(padded=False)
    before = small(**inputs).logits
    for module in small.modules():
        if hasattr(module, "scaling") and hasattr(module, "ragged"):
            module.scaling = 3 * module.scaling
    ragged = small(**inputs).logits
    small.set_attn_implementation("eager")  # transformers' own attention
    torch.testing.assert_close(ragged, small(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert (ragged - before).abs().max() > 1e-3


def test_embeddings_without_memory_on_the_cpu_are_not_taken_for_changed():
    """A GPU's have no fingerprint: the head would be rounded at every token."""
    embeddings = nn.Embedding(7, 5, device="meta")
    rounded = Rounded(embeddings)
    assert rounded.changed() is None
    embeddings.weight = nn.Parameter(torch.empty(7, 5, device="meta"))
    assert rounded.changed() is embeddings.weight and rounded.changed() is None
