"""ChannelMask: binary forward, the sigmoid's gradient, noise that is a function of (seed, step), final masks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekern.nn import ChannelMask

torch.set_num_threads(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_mask(groups=64, seed=0, **kwargs):
    mask = ChannelMask(groups, **kwargs)
    with torch.no_grad():
        mask.logits.copy_(torch.randn(groups, generator=generator(seed)))
        mask.threshold.fill_(0.3)
    mask.draw(generator(seed + 1))
    return mask


def test_starts_with_everything_kept():
    for training in (True, False):
        mask = ChannelMask(5).train(training)
        assert torch.equal(mask(), torch.ones(5))
        assert bool(mask.kept().all()) and mask.threshold == 0 and not mask.final


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_forward_is_exactly_binary_and_is_the_sign(temperature):
    mask = random_mask(10_000, temperature=temperature).train()
    with torch.no_grad():
        mask.logits.mul_(20)  # soft values near 0 and 1 must not leak into the hard one
    out = mask()
    assert set(out.unique().tolist()) == {0.0, 1.0}
    want = (mask.logits.double() - 0.3 + mask.noise.double()) > 0
    sure = (mask.logits - mask.threshold + mask.noise).abs() > 1e-5
    assert torch.equal(out[sure] == 1, want[sure])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_straight_through_gradient_is_that_of_the_sigmoid(temperature):
    mask = random_mask(64, temperature=temperature).train()
    weight = torch.randn(64, generator=generator(9))
    (mask() * weight).sum().backward()
    logits = mask.logits.detach().double().requires_grad_(True)
    soft = torch.sigmoid((logits - mask.threshold.double() + mask.noise.double()) / temperature)
    (soft * weight.double()).sum().backward()
    # Where sigmoid is near 1, 1 - sigmoid is what fp32 leaves of it: half a unit of 1, times 1 / temperature.
    tolerance = torch.finfo(torch.float32).eps * (4 / temperature) * float(weight.abs().max())
    torch.testing.assert_close(mask.logits.grad.double(), logits.grad, rtol=1e-5, atol=tolerance)
    assert (mask.logits.grad[mask() == 0] != 0).all()  # a pruned group can come back


def test_noise_is_held_between_draws():
    mask = random_mask().train()
    first, noise = mask(), mask.noise.clone()
    for _ in range(3):
        assert torch.equal(mask(), first) and torch.equal(mask.noise, noise)
    mask.draw(generator(77))
    assert not torch.equal(mask.noise, noise)


def test_noise_is_a_function_of_the_generator_alone():
    a, b = ChannelMask(1000), ChannelMask(1000)
    torch.rand(3)  # the global stream does not matter
    a.draw(generator(5))
    torch.rand(7)
    b.draw(generator(5))
    assert torch.equal(a.noise, b.noise)
    b.draw(generator(6))
    assert not torch.equal(a.noise, b.noise)


def test_noise_is_logistic():
    """So that a group is kept with probability sigmoid(logit - threshold): Kolmogorov-Smirnov, 1 in 10^5 to fail."""
    mask = ChannelMask(200_000)
    mask.draw(generator(0))
    x = mask.noise.double().sort().values
    n = x.numel()
    empirical = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (torch.sigmoid(x) - empirical).abs().max() < 2.5 / n**0.5
    assert torch.isfinite(x).all()


def test_eval_rule_is_logits_above_threshold():
    mask = ChannelMask(4).eval()
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([0.2, 0.3, 0.31, -1.0]))
        mask.threshold.fill_(0.3)
    mask.draw(generator(0))  # noise does not enter
    assert mask().tolist() == [0, 0, 1, 0]  # at the threshold itself: pruned
    assert mask.kept().tolist() == [False, False, True, False]
    assert not mask().requires_grad


def test_forward_dtype():
    mask = random_mask()
    assert mask().dtype == torch.float32 and mask(torch.float64).dtype == torch.float64
    assert mask(torch.float64).requires_grad


def test_row_group_maps_groups_to_channels():
    row_group = torch.tensor([0, 1, 2, 0, 1, 2])  # rotary pairs: rows j and j + 3
    mask = random_mask(3, row_group=row_group).train()
    with torch.no_grad():
        mask.noise.copy_(torch.tensor([5.0, -5.0, 5.0]))
    assert mask().tolist() == [1, 0, 1, 1, 0, 1]
    mask().sum().backward()
    s = torch.sigmoid((mask.logits - mask.threshold + mask.noise).detach())
    torch.testing.assert_close(mask.logits.grad, 2 * s * (1 - s))  # both channels of the pair
    mask.finalize(torch.tensor([False, True, True]))
    assert mask().tolist() == [0, 1, 1, 0, 1, 1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([-2.0, -1e-30, 0.0, 1e-30, 0.5, 1.0, 1.0000001, 3e7, -3e7]), st.booleans()),
        min_size=1,
    )
)
def test_finalize_keeps_exactly_what_it_is_told(entries):
    """Ties, kept below removed, huge and tiny logits: `logits > threshold` must say exactly `kept`."""
    logits, kept = (list(t) for t in zip(*entries, strict=True))
    mask = ChannelMask(len(kept))
    with torch.no_grad():
        mask.logits.copy_(torch.tensor(logits))
    mask.draw(generator(0))
    kept = torch.tensor(kept)
    mask.finalize(kept)
    for training in (True, False):
        mask.train(training)
        assert torch.equal(mask() == 1, kept)
    assert torch.equal(mask.kept(), kept) and torch.equal(mask.logits > mask.threshold, kept)
    assert bool(mask.final) and not mask.logits.requires_grad and not mask().requires_grad


def test_finalize_leaves_logits_that_need_no_lift():
    mask = random_mask(64)
    before = mask.logits.detach().clone()
    mask.finalize(before > before.median())
    assert torch.equal(mask.logits, before)


def test_final_mask_ignores_noise():
    mask = random_mask(64)
    mask.finalize(torch.arange(64) % 2 == 0)
    mask.train()
    before = mask()
    mask.draw(generator(123))
    assert torch.equal(mask(), before)


@pytest.mark.parametrize("final", [True, False])
def test_state_dict_round_trip(final):
    mask = random_mask(16)
    if final:
        mask.finalize(torch.arange(16) < 5)
    state = mask.state_dict()
    assert set(state) == {"logits", "threshold", "final", "saliency"}
    for other in (ChannelMask(16), random_mask(16, seed=3)):
        other.load_state_dict(copy.deepcopy(state))
        assert torch.equal(other.kept(), mask.kept())
        assert bool(other.final) == final and other.logits.requires_grad != final
        if final:
            other.train()
            assert torch.equal(other() == 1, torch.arange(16) < 5)
    back = ChannelMask(16)
    back.finalize(torch.arange(16) < 9)
    back.load_state_dict(ChannelMask(16).state_dict())  # a final mask can be made to learn again by loading
    assert not back.final and back.logits.requires_grad and back.train()().requires_grad


def test_deepcopy_keeps_the_final_mask():
    mask = random_mask(16)
    mask.finalize(torch.arange(16) < 5)
    twin = copy.deepcopy(mask).train()
    assert torch.equal(twin() == 1, torch.arange(16) < 5)
    with torch.no_grad():
        twin.logits.fill_(-9)
    assert int(mask.kept().sum()) == 5


def test_compile_fullgraph():
    mask = random_mask(16).train()
    torch._dynamo.reset()
    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager")
    out = compiled()
    assert torch.equal(out, mask())
    out.sum().backward()
    assert (mask.logits.grad != 0).all()


@pytest.mark.parametrize(
    "args,message",
    [
        ((0,), r"ChannelMask: groups must be at least 1 \(got 0\)"),
        ((3, None, 0.0), r"ChannelMask: temperature must be positive \(got 0.0\)"),
        ((3, None, -1.0), r"ChannelMask: temperature must be positive \(got -1.0\)"),
        ((3, None, float("nan")), r"ChannelMask: temperature must be positive \(got nan\)"),
    ],
)
def test_refusals(args, message):
    with pytest.raises(ValueError, match=message):
        ChannelMask(*args)
