"""All blocks of a decoder in one call give what the blocks give one by one, whatever happens around them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import prunekern as pk
from prunekern.families.decoders import step as decoder_step
from tests.helpers.decoder_steps import IDS, ONE_CALL, by_parts, compact, go_on, start
from tests.helpers.tiny_decoders import LAYERS, batch, build
from tests.helpers.tiny_models import attached, prune


@pytest.fixture
def stacks(monkeypatch):
    """How many blocks each call of the core ran."""
    real, stacks = decoder_step._RUN, []

    def spy(*args):
        y = real(*args)
        if y is not None:
            stacks.append(len(args[-1]))
        return y

    monkeypatch.setattr(decoder_step, "_RUN", spy)
    return stacks


@pytest.mark.parametrize("size", (1, 3))
@pytest.mark.parametrize("family", ONE_CALL)
def test_a_token_is_one_call(family, size, stacks):
    small, ids = compact(family), batch(size, 24, padded=False)["input_ids"]
    with by_parts():
        want = go_on(small, start(small, ids), ids)
    assert torch.equal(go_on(small, start(small, ids), ids), want)
    assert stacks == [LAYERS] * 4
    out = small.model(ids[:, 8:9], past_key_values=start(small, ids))
    assert type(out).__name__ == "BaseModelOutputWithPast" and out.past_key_values is not None


def test_generation_is_one_call_a_token(stacks):
    small = compact()
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with by_parts():
        want = small.generate(IDS[:, :8], **greedy)
    assert torch.equal(small.generate(IDS[:, :8], **greedy), want)
    assert stacks == [LAYERS] * 4  # the first of the five comes with the prompt


def test_tensors_among_the_other_arguments(stacks):
    """They are transformers' to understand, or to ignore."""
    small = compact()
    with by_parts(), torch.no_grad():
        want = small.model(IDS[:, 8:9], past_key_values=start(small)).last_hidden_state
    with torch.no_grad():
        got = small.model(IDS[:, 8:9], past_key_values=start(small), cache_position=torch.arange(8, 9).repeat(2))
    assert torch.equal(got.last_hidden_state, want) and LAYERS not in stacks


def test_tuples_where_they_are_asked_for():
    small = compact()
    with torch.no_grad():
        got = small.model(IDS[:, 8:9], past_key_values=start(small), return_dict=False)
        with by_parts():
            want = small.model(IDS[:, 8:9], past_key_values=start(small), return_dict=False)
    assert type(got) is type(want) is tuple and torch.equal(got[0], want[0])


def test_a_model_alone_calls_its_blocks(stacks):
    """Its class is transformers' own, as everybody expects."""
    small = compact()
    bare = pk.compact(attached_base())
    cache = DynamicCache(config=bare.config)
    with torch.no_grad():
        bare(IDS[:, :8], past_key_values=cache)
        bare(IDS[:, 8:9], past_key_values=cache)
    assert stacks == [1] * LAYERS and type(bare).__module__.startswith("transformers.")
    assert type(small.model).__name__ == "LlamaModel" and str(type(small.model)) == str(type(bare))


def attached_base():
    model = build("llama").model
    prune(attached(model), 0.4, seed=1)
    return model


def asked_for_hidden_states(small):
    return {"output_hidden_states": True}


def hook_on_a_block(small):
    small.model.layers[1].register_forward_hook(lambda *args: None)
    return {}


def block_replaced(small):
    small.model.layers[0] = Wrapped(small.model.layers[0])
    return {}


def block_forward_replaced(small):
    block = small.model.layers[1]
    block.forward = lambda *args, inner=block.forward, **kwargs: inner(*args, **kwargs)
    return {}


def blocks_swapped(small):
    small.model.layers = nn.ModuleList([small.model.layers[1], small.model.layers[0]])
    return {}


def fewer_layers(small):
    small.config.num_hidden_layers = 1
    return {}


def config_asks(small):
    small.config.output_hidden_states = True
    return {}


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "change",
    (
        asked_for_hidden_states,
        hook_on_a_block,
        block_replaced,
        block_forward_replaced,
        blocks_swapped,
        fewer_layers,
        config_asks,
    ),
)
def test_what_happens_around_blocks_is_seen(change, stacks):
    """Each of these after a token that was one call."""
    small = compact()
    cache = start(small)
    go_on(small, cache, tokens=1)
    assert stacks == [LAYERS]
    stacks.clear()
    more = change(small)
    with torch.no_grad():
        got = small(IDS[:, 9:10], past_key_values=copy.deepcopy(cache), **more)
        assert LAYERS not in stacks
        with by_parts():
            want = small(IDS[:, 9:10], past_key_values=copy.deepcopy(cache), **more)
    assert torch.equal(got.logits, want.logits)
    if change in (asked_for_hidden_states, config_asks):
        assert all(map(torch.equal, got.hidden_states, want.hidden_states)) and len(got.hidden_states) == LAYERS + 1


def test_weights_of_any_block_are_seen(stacks):
    small = compact(kind="int8")
    cache = start(small)
    go_on(small, cache, tokens=1)
    for block in small.model.layers:
        with torch.no_grad():
            block.post_attention_layernorm.weight.mul_(1.5)
            block.mlp.down_proj.scale.mul_(1.5)
        with by_parts():
            want = go_on(small, copy.deepcopy(cache), tokens=1)
        assert torch.equal(go_on(small, copy.deepcopy(cache), tokens=1), want)
    assert stacks == [LAYERS] * (LAYERS + 1)


def test_copies_have_stacks_of_their_own(stacks):
    small = compact()
    go_on(small, start(small), tokens=1)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.mul_(2)
        with by_parts():
            want = go_on(other, start(other))
        assert torch.equal(go_on(other, start(other)), want)
        assert not torch.equal(go_on(small, start(small)), want)
