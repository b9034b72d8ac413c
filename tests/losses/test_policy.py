import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from rlhf_kernels import PolicyLossSpec, policy_terms

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.policy import ClippedSurrogate, clipped_surrogate


def at_ratio(ratio: float, advantage: float, **bounds) -> tuple[float, float, bool]:
    """Loss, its gradient in the log-probability, and the flag, of one token."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    out = clipped_surrogate(logprobs, torch.zeros_like(advantages), advantages, **bounds)
    assert out.ratio.item() == pytest.approx(ratio)
    assert not out.ratio.requires_grad
    return out.per_token.item(), torch.autograd.grad(out.per_token.sum(), logprobs)[0].item(), out.clipped.item()


BOUNDS = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, False),  # inside
        (1.5, 2.0, -2.6, 0.0, True),  # good token, already up: 1.3 * 2
        (0.5, 2.0, -1.0, -1.0, False),  # good token that fell: pulled back up however far
        (0.5, -2.0, 1.6, 0.0, True),  # bad token, already down: 0.8 * 2
        (1.5, -2.0, 3.0, 3.0, False),  # bad token that rose: pushed down however far
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_every_side_of_the_trust_region(ratio, advantage, loss, gradient, clipped):
    assert at_ratio(ratio, advantage, **BOUNDS) == (pytest.approx(loss), pytest.approx(gradient), clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (2.9, -2.0, 5.8, 5.8, False),
        (10.0, -2.0, 6.0, 0.0, True),  # held at 3 * 2
        (10.0, 2.0, -2.6, 0.0, True),  # a positive advantage never meets the second bound
        (0.5, -2.0, 1.6, 0.0, True),
    ],
)
def test_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    expected = (pytest.approx(loss), pytest.approx(gradient), clipped)
    assert at_ratio(ratio, advantage, dual_clip=3.0, **BOUNDS) == expected


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 50), st.floats(-3, 3), st.none() | st.floats(1.5, 10))
def test_the_flag_says_where_the_gradient_stopped(ratio, advantage, dual_clip):
    _, gradient, clipped = at_ratio(ratio, advantage, dual_clip=dual_clip, **BOUNDS)
    if abs(advantage) > 1e-6 and min(abs(ratio - bound) for bound in (0.8, 1.3, dual_clip or 0)) > 1e-6:
        assert (gradient == 0) == clipped


def test_on_policy_its_gradient_is_reinforces():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 7, (2, 4, 1), generator=generator)
    advantages = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1).gather(-1, tokens)[..., 0]
    loss = ClippedSurrogate(dual_clip=3.0)(logprobs, logprobs.detach(), advantages, torch.ones(2, 4).bool())
    reinforce = -(advantages * logprobs).sum()
    ours = torch.autograd.grad(loss.per_token.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(reinforce, logits)[0])
    assert (loss.ratio == 1).all()
    assert not loss.clipped.any()


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_kernels_compute_the_same_loss_and_gradient(dual_clip):
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = torch.randn(3, 8, 16, generator=generator, dtype=torch.float64)
    logprobs.requires_grad_()
    ours = clipped_surrogate(logprobs, old, advantages, dual_clip=dual_clip, **BOUNDS)
    spec = PolicyLossSpec(form="clipped", dual_clip=dual_clip, **BOUNDS)
    theirs = policy_terms(logprobs.detach(), old, advantages, torch.ones(8, 16).bool(), spec)
    torch.testing.assert_close(ours.per_token, theirs.loss)
    torch.testing.assert_close(torch.autograd.grad(ours.per_token.sum(), logprobs)[0], theirs.logprob_slope)
    torch.testing.assert_close(ours.ratio, theirs.ratio)
    assert (ours.clipped == theirs.clipped).all()
    assert ours.clipped.any()


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_policy_far_away_gives_no_nan(log_ratio, advantage, dual_clip):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    out = clipped_surrogate(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), dual_clip=dual_clip, **BOUNDS)
    out.per_token.sum().backward()
    assert out.per_token.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_advantages_of_another_shape_are_refused():
    with pytest.raises(TypeCheckError, match="advantages"):
        clipped_surrogate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(1, 3), **BOUNDS)


@pytest.mark.parametrize(
    "arguments", [{"clip_low": 0.0}, {"clip_low": -0.2}, {"clip_high": 0.0}, {"dual_clip": 1.0}, {"clip_low": math.nan}]
)
def test_impossible_bounds_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        ClippedSurrogate(**arguments)
