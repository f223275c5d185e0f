"""Decoding in one call a block gives, bit for bit, what the calls of its parts give, whatever happens in between."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import prunekern as pk
from prunekern import _native
from prunekern.families.decoders import step as decoder_step
from prunekern.families.decoders.norms import FAST_NORMS
from tests.helpers.decoder_steps import IDS, ONE_CALL, by_parts, compact, go_on, start
from tests.helpers.tiny_decoders import FAMILIES, LAYERS, batch, build
from tests.helpers.tiny_models import attached, prune


@pytest.fixture
def calls(monkeypatch):
    """Grows by one for every block that runs as one call."""
    assert _native.available(), _native.why_not()
    real, calls = decoder_step._RUN, []

    def spy(*args):
        y = real(*args)
        if y is not None:
            calls.extend(args[-1])
        return y

    monkeypatch.setattr(decoder_step, "_RUN", spy)
    return calls


def same(a: DynamicCache, b: DynamicCache) -> bool:
    return all(
        torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(a.layers, b.layers, strict=True)
    )


# -- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("kind", ("fp32", "bf16", "int8", "int4"))
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_equals_its_parts(family, kind, size, calls):
    small, ids = compact(family, kind), batch(size, 24, padded=False)["input_ids"]
    with by_parts():
        want_cache = start(small, ids)
        want = go_on(small, want_cache, ids, 16)
    cache = start(small, ids)
    assert not calls
    assert torch.equal(go_on(small, cache, ids, 16), want)
    assert len(calls) == (16 * LAYERS if family in ONE_CALL else 0)
    assert same(cache, want_cache) and cache.get_seq_length() == 24


def test_room_grows(monkeypatch, calls):
    monkeypatch.setattr("prunekern.families.decoders.cache_room._LEAST", 2)
    small = compact()
    with by_parts():
        want = go_on(small, start(small), tokens=16)
    assert torch.equal(go_on(small, start(small), tokens=16), want) and len(calls) == 16 * LAYERS


@pytest.mark.parametrize("share", (0.0, 0.97, 1.0))
def test_little_or_nothing_left(share):
    small = compact(share=share)
    with by_parts():
        want = go_on(small, start(small))
    assert torch.equal(go_on(small, start(small)), want)


def test_what_is_not_ordinary_runs_by_parts(calls):
    small = compact()
    cache = start(small)
    small(IDS[:, 8:9], past_key_values=copy.deepcopy(cache))  # wants a gradient, for all it knows
    with torch.no_grad():
        small(IDS[:, 8:9], use_cache=False)
        small.double()(IDS[:, 8:9], past_key_values=start(small))
        small.float().config._attn_implementation = "eager"
        small(IDS[:, 8:9], past_key_values=copy.deepcopy(cache))
        small.config._attn_implementation = "sdpa"
        assert not calls
        mask = torch.ones(1, 9, dtype=torch.int64)
        small(IDS[:, 8:9], past_key_values=copy.deepcopy(cache), attention_mask=mask)
        assert len(calls) == LAYERS
        mask[0, 0] = 0
        small(IDS[:, 8:9], past_key_values=copy.deepcopy(cache), attention_mask=mask)
        assert len(calls) == LAYERS


# -- the cache -------------------------------------------------------------------------------------------------


def cropped(cache):
    cache.crop(-3)
    return [cache]


def repeated(cache):
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    return [cache]


def copied(cache):
    return [cache, copy.deepcopy(cache)]


def shared(cache):
    """Two caches whose layers hold the very same tensors: what one writes must not reach the other."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return [cache, other]


@pytest.mark.parametrize("change", (cropped, repeated, copied, shared))
def test_caches_that_others_change(change, calls):
    small, results = compact(), []
    for context in (by_parts(), None):
        if context:
            context.__enter__()
        caches = start(small)
        go_on(small, caches)
        kept = caches.layers[0].keys, caches.layers[0].keys.clone()
        caches = change(caches)
        got = []
        for turn in range(3):
            for i, cache in enumerate(caches):
                ids = (IDS + i + turn).expand(cache.layers[0].keys.shape[0], -1)
                got.append(go_on(small, cache, ids, 2))
        assert torch.equal(*kept)  # what was seen once is not written again
        results.append(torch.cat(got))
        if context:
            context.__exit__()
    assert torch.equal(*results) and calls


# -- the block -------------------------------------------------------------------------------------------------


def modules_of(block):
    attention, ffn = block.self_attn, block.mlp
    names = "q_proj", "k_proj", "v_proj", "o_proj"
    return [
        attention, ffn, block.input_layernorm, block.post_attention_layernorm,
        *(getattr(attention, n) for n in names), ffn.gate_proj, ffn.up_proj, ffn.down_proj,
    ]  # fmt: skip


def test_hooks_are_called(calls):
    small = compact()
    cache, block = start(small), small.model.layers[0]
    go_on(small, cache, tokens=1)
    for module in modules_of(block):
        seen, real = [], module.forward
        calls.clear()
        hooks = [module.register_forward_hook(lambda *_, seen=seen: seen.append(1))]
        hooks.append(module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1)))
        go_on(small, cache, tokens=1)
        assert len(seen) == 2 and len(calls) == LAYERS - 1, type(module)
        for hook in hooks:
            hook.remove()
        module.forward = lambda *a, seen=seen, real=real, **k: (seen.append(1), real(*a, **k))[1]  # as accelerate does
        go_on(small, copy.deepcopy(cache), tokens=1)
        assert len(seen) == 3, type(module)
        del module.forward
        calls.clear()
        go_on(small, copy.deepcopy(cache), tokens=1)
        assert len(calls) == LAYERS


@torch.no_grad()
def in_place(layer):
    layer.weight.mul_(1.5)


def other_data(layer):
    layer.weight.data = layer.weight.data * 1.5


def other_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


def other_scale(layer):
    layer.scale = layer.scale * 1.5


CHANGES = [("fp32", change, which) for change in (in_place, other_data, other_parameter) for which in range(2, 11)]
CHANGES += [(kind, other_scale, which) for kind in ("int8", "int4") for which in range(4, 11)]


@pytest.mark.parametrize("kind, change, which", CHANGES)
def test_changed_weights_are_noticed(kind, change, which, calls):
    small = compact(kind=kind)
    cache = start(small)
    go_on(small, cache, tokens=1)
    old, new = copy.deepcopy(cache), copy.deepcopy(cache)
    before = go_on(small, old, tokens=2)
    change(modules_of(small.model.layers[1])[which])
    with by_parts():
        want = go_on(small, copy.deepcopy(cache), tokens=2)
    calls.clear()
    got = go_on(small, new, tokens=2)
    assert torch.equal(got, want) and not torch.equal(got, before) and len(calls) == 2 * LAYERS


def test_memory_that_came_back_is_not_taken_for_the_old(calls):
    """Rounded and widened again, a weight may lie where the old one lay."""
    small = compact()
    for _ in range(12):
        cache = start(small)
        go_on(small, cache)
        for block in small.model.layers:
            block.mlp.down_proj.weight.data.mul_(1.01)
            block.mlp.down_proj.bfloat16().float()
        for block in small.model.layers:
            assert block._step is not None and not block._step.is_fresh()


def test_changed_modules_are_noticed(calls):
    small = compact()
    cache, block = start(small), small.model.layers[0]
    go_on(small, cache, tokens=1)
    other = copy.deepcopy(block.mlp.down_proj)
    with torch.no_grad():
        other.weight.mul_(2)
    block.mlp.down_proj = other
    block.input_layernorm.variance_epsilon = 0.1
    copies = [copy.deepcopy(cache) for _ in range(2)]
    with by_parts():
        want = go_on(small, copies[0])
    assert torch.equal(go_on(small, copies[1]), want)


def test_copies_make_their_own(calls):
    small = compact()
    cache = start(small)
    go_on(small, cache, tokens=1)
    assert small.model.layers[0]._step is not None
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert all(block._step is None for block in twin.model.layers)
        calls.clear()
        with torch.no_grad():
            twin.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert not torch.equal(go_on(twin, copy.deepcopy(cache)), go_on(small, copy.deepcopy(cache)))
        assert len(calls) == 2 * 4 * LAYERS


# -- norms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_stay_what_they_are(family):
    model = build(family)
    prune(attached(model), 0.4)
    small = pk.compact(model)
    kinds = {name: type(m) for name, m in model.named_modules() if name.endswith("norm")}
    assert len(kinds) == 1 + LAYERS * (4 if family == "qwen3" else 2)
    x = torch.randn(2, 3, 5, next(iter(small.parameters())).shape[-1])
    for name, kind in kinds.items():
        ours, theirs = small.get_submodule(name), model.get_submodule(name)
        assert isinstance(ours, kind) and type(ours) in FAST_NORMS and type(theirs) not in FAST_NORMS
        assert ours.state_dict().keys() == theirs.state_dict().keys() and "RMSNorm" in type(ours).__name__
        part = x[..., : ours.weight.numel()]
        for one in (part, part.bfloat16()):
            got, want = ours(one), theirs(one)
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        hard = part.clone().requires_grad_()
        torch.testing.assert_close(
            *(torch.autograd.grad(norm(hard).square().sum(), hard)[0] for norm in (ours, theirs)), rtol=0, atol=0
        )
        assert torch.equal(ours.double()(part.double()), theirs.double()(part.double()))
