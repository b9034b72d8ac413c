import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from rlhf_kernels import PolicyLossSpec, policy_terms

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses.policy import (
    Cispo,
    ClippedSurrogate,
    Gspo,
    Reinforce,
    Sapo,
    clipped_surrogate,
)


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


def rollout(rows=8, time=16, seed=0):
    """Log-probabilities with a gradient, older ones a ratio of e or so away, advantages, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, old = -torch.rand(2, rows, time, generator=generator, dtype=torch.float64) * 3
    advantages = torch.randn(rows, 1, generator=generator, dtype=torch.float64).expand(rows, time).contiguous()
    mask = torch.arange(time) < torch.randint(1, time + 1, (rows, 1), generator=generator)
    return logprobs.requires_grad_(), old, advantages, mask


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("loss", "form", "options"),
    [
        (ClippedSurrogate, "clipped", BOUNDS),
        (ClippedSurrogate, "clipped", {"dual_clip": 1.5, **BOUNDS}),
        (Cispo, "cispo", BOUNDS),
        (Cispo, "cispo", {"clip_low": 1.0, "clip_high": 4.0}),
        (Sapo, "sapo", {"tau_up": 1.0, "tau_down": 1.3}),
    ],
)
def test_the_kernels_compute_the_same_loss_and_gradient(loss, form, options, ratio):
    logprobs, old, advantages, mask = rollout()
    ours = loss(ratio=ratio, **options)(logprobs, old, advantages, mask)
    spec = PolicyLossSpec(form=form, ratio=ratio, **{k.replace("tau", "sapo_tau"): v for k, v in options.items()})
    theirs = policy_terms(logprobs.detach(), old, advantages, mask, spec)
    torch.testing.assert_close(torch.where(mask, ours.per_token, 0.0), theirs.loss)
    torch.testing.assert_close(torch.where(mask, ours.ratio, 0.0), theirs.ratio)
    assert torch.equal(ours.clipped & mask, theirs.clipped)
    gradient = torch.autograd.grad(ours.per_token[mask].sum(), logprobs)[0]
    torch.testing.assert_close(gradient, theirs.logprob_slope)  # the kernel's own derivative against autograd


def test_reinforce_is_the_clipped_surrogate_without_bounds_on_policy():
    logprobs, _, advantages, mask = rollout()
    reinforce = Reinforce()(logprobs, logprobs.detach(), advantages, mask).per_token
    unbounded = ClippedSurrogate(math.inf, math.inf)(logprobs, logprobs.detach(), advantages, mask).per_token
    torch.testing.assert_close(reinforce, -advantages * logprobs)
    gradients = [torch.autograd.grad(loss.sum(), logprobs)[0] for loss in (reinforce, unbounded)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gspo_of_answers_of_one_token_is_grpo():
    logprobs, old, advantages, _ = rollout()
    mask = torch.arange(16).expand(8, 16) == 3
    for per_token in (False, True):
        gspo = Gspo(0.2, 0.3, per_token=per_token)(logprobs, old, advantages, mask)
        grpo = ClippedSurrogate(0.2, 0.3)(logprobs, old, advantages, mask)
        torch.testing.assert_close(gspo.per_token[mask], grpo.per_token[mask])
        gradients = [torch.autograd.grad(out.per_token[mask].sum(), logprobs)[0] for out in (gspo, grpo)]
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "length_weighted"])
def test_gspo_token_has_gspos_gradient(how):
    logprobs, old, advantages, mask = rollout()
    old = logprobs.detach() + 2e-3 * (old + 1.5)  # some sequences within the bounds, some without
    both = [Gspo(per_token=per_token)(logprobs, old, advantages, mask) for per_token in (False, True)]
    assert both[0].clipped[mask].any()
    assert not both[0].clipped[mask].all()
    losses = [reduce_tokens(out.per_token, mask, how) for out in both]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gspo_by_hand():
    old = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
    logprobs = (old + torch.tensor([[0.1, 0.3, 9.0], [-0.5, 9.0, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([[2.0] * 3, [-1.0] * 3], dtype=torch.float64)
    out = Gspo(0.1, 0.3)(logprobs, old, advantages, mask)
    assert out.per_token[mask].tolist() == pytest.approx([-2 * math.exp(0.2)] * 2 + [0.9])
    assert out.clipped[mask].tolist() == [False, False, True]
    loss = reduce_tokens(out.per_token, mask, "sequence_mean")
    gradient = torch.autograd.grad(loss, logprobs)[0]
    assert gradient[0].tolist() == pytest.approx([-math.exp(0.2) / 2] * 2 + [0.0])
    assert gradient[1].tolist() == [0.0] * 3


def test_cispo_truncates_the_weight_and_keeps_the_gradient():
    log_ratio = torch.tensor([[math.log(8.0), math.log(0.5), math.log(2.0)]])
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    out = Cispo()(logprobs, logprobs.detach() - log_ratio, torch.tensor([[2.0, 2.0, -2.0]]), torch.ones(1, 3).bool())
    assert out.per_token[0].tolist() == pytest.approx([5 * 2 * 1.0, 0.5 * 2 * 2.0, -2 * 2 * 3.0])
    assert torch.autograd.grad(out.per_token.sum(), logprobs)[0][0].tolist() == pytest.approx([-10.0, -1.0, 4.0])
    assert out.clipped.tolist() == [[True, False, False]]


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.0), (-2.0, 1.5)])
def test_sapos_gate_by_hand(advantage, tau):
    logprobs = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    advantages = torch.full((1, 2), advantage, dtype=torch.float64)
    out = Sapo(tau_down=1.5)(logprobs, torch.zeros_like(advantages), advantages, torch.ones(1, 2).bool())
    gate = 1 / (1 + math.exp(-2 * tau))
    assert out.per_token[0].tolist() == pytest.approx([-advantage * 2 / tau, -advantage * 4 / tau * gate])
    gradient = torch.autograd.grad(out.per_token.sum(), logprobs)[0][0]
    assert gradient.tolist() == pytest.approx([-advantage, -advantage * 4 * gate * (1 - gate) * 3])


@pytest.mark.parametrize("delta", [1.3, 2.0, 1.1])
def test_dual_clip_is_trls_delta_above_the_upper_bound(delta):
    ratio = torch.linspace(0.1, 4, 200, dtype=torch.float64)[None]
    for advantage in (1.5, -1.5):
        advantages = torch.full_like(ratio, advantage)
        ours = clipped_surrogate(ratio.log(), torch.zeros_like(ratio), advantages, dual_clip=delta, **BOUNDS).per_token
        theirs = -torch.minimum(ratio.clamp(max=delta) * advantages, ratio.clamp(0.8, 1.3) * advantages)
        if delta >= 1.3:
            torch.testing.assert_close(ours, theirs)
        else:  # far up: theirs gives delta to the good and 1 + clip_high to the bad, ours the other way round
            bounds = (1.3, delta) if advantage > 0 else (delta, 1.3)
            assert (ours[0, -1].item(), theirs[0, -1].item()) == pytest.approx(tuple(-b * advantage for b in bounds))


def test_sequence_sum_is_the_ratio_of_the_answers():
    logprobs, old, advantages, mask = rollout(rows=3, time=2)
    out = ClippedSurrogate(math.inf, math.inf, ratio="sequence_sum")(logprobs, old, advantages, mask)
    ratio = torch.where(mask, logprobs - old, 0.0).sum(-1).exp()
    torch.testing.assert_close(out.per_token[:, 0], -ratio * advantages[:, 0])


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


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [(Gspo, {"clip_low": 0.0}), (Cispo, {"clip_high": -1.0}), (Sapo, {"tau_up": 0.0}), (Sapo, {"tau_down": -1.0})],
)
def test_impossible_options_of_other_forms_are_named(loss, arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        loss(**arguments)
