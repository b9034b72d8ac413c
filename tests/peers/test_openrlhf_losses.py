"""Losses and reductions of the policy, the critic, SFT; KL and log-probabilities: against OpenRLHF's own functions.

Values and gradients, on ragged batches that hold every case. Where we differ on purpose, the test is named so and
states both numbers.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf_peer import (
    TOLERANCE,
    assert_same_value_and_gradient,
    logprobs_like,
    openrlhf_arguments,
    openrlhf_parser,
    ragged,
)
from peer_packages import peer_module
from torch import Tensor

from rlhf_lightning.core.kl import kl_estimate, kl_penalty
from rlhf_lightning.core.logprobs import LMHead, token_scores
from rlhf_lightning.core.masked import reduce_tokens
from rlhf_lightning.losses import ClippedSurrogate, ClippedValue, Gspo, SamplerCorrection, SamplerFilter
from rlhf_lightning.losses.supervised import token_nll

losses = peer_module("openrlhf.models.loss")
utils = peer_module("openrlhf.models.utils")
loss_utils = peer_module("openrlhf.utils.loss_utils")

LENGTHS = [3, 6, 1, 5]
MASK = ragged(LENGTHS)
HOW = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean"}
"""Their `actor.loss_agg_mode`, our `reduction`."""


def policies() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities being trained, of the policy that sampled, of its engine, and advantages of both signs."""
    now = logprobs_like(MASK, seed=0).requires_grad_()
    old = logprobs_like(MASK, seed=1, scale=0.6, near=now)
    engine = logprobs_like(MASK, seed=2, scale=0.5, near=old)
    advantages = torch.where(MASK, torch.randn(MASK.shape, generator=torch.Generator().manual_seed(3)), 0.0)
    return now, old, engine, advantages


def language_model() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of four sequences, their tokens, an output head of 13 tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=generator).requires_grad_()
    return hidden, torch.randint(13, (4, 6), generator=generator), 0.7 * torch.randn(13, 8, generator=generator)


def their_loss(how: str = "token-mean", **options: Any) -> Any:
    bounds = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
    return losses.PolicyLoss(**(bounds | options), token_level_loss=how == "token-mean")


# --- the policy's loss


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_ppo(how, dual_clip):
    now, old, _, advantages = policies()
    theirs, clip_frac, approx_kl, *_ = their_loss(how, dual_clip=dual_clip)(now, old, advantages, MASK)
    out = ClippedSurrogate(0.2, 0.3, dual_clip)(now, old, advantages, MASK)
    assert_same_value_and_gradient(reduce_tokens(out.per_token, MASK, HOW[how]), theirs, now)
    assert approx_kl.item() == pytest.approx((old - now)[MASK].mean().item(), rel=1e-5)  # ours is k3, not k1
    clipped = out.clipped[MASK].float().mean().item()
    assert clipped > clip_frac.item() if dual_clip else clipped == pytest.approx(clip_frac.item())


def test_differs_what_the_share_of_clipped_tokens_counts():
    """Theirs leaves out tokens that the dual clip stopped; their gradient is 0 like that of the others."""
    now, both = torch.tensor([[-0.1, -0.1]], requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    old = now.detach() - torch.tensor([[4.0, 1.0]]).log()
    advantages = torch.tensor([[-1.0, 1.0]])
    loss, clip_frac, *_ = their_loss(dual_clip=3.0)(now, old, advantages, both)
    out = ClippedSurrogate(0.2, 0.3, 3.0)(now, old, advantages, both)
    assert torch.autograd.grad(loss, now)[0].tolist() == [[0.0, -0.5]]
    assert (clip_frac.item(), out.clipped.float().mean().item()) == (0.0, 0.5)


@pytest.mark.parametrize("dual_clip", [None, 1.05])
def test_gspo(dual_clip):
    """Always the mean of answers, whatever loss_agg_mode says; with a dual clip it is our ClippedSurrogate's ratio."""
    now, old, _, advantages = policies()
    old = torch.where(MASK, now.detach() + 0.2 * (old - now.detach()), 0.0)
    bounds = {"clip_eps_low": 0.05, "clip_eps_high": 0.02}
    theirs, *_ = their_loss(policy_loss_type="gspo", dual_clip=dual_clip, **bounds)(now, old, advantages, MASK)
    ours = Gspo(0.05, 0.02) if dual_clip is None else ClippedSurrogate(0.05, 0.02, dual_clip, ratio="sequence")
    out = ours(now, old, advantages, MASK)
    assert 0 < out.clipped[MASK].sum() < MASK.sum()
    assert_same_value_and_gradient(reduce_tokens(out.per_token, MASK, "sequence_mean"), theirs, now)


def test_gspo_with_a_correction_takes_its_ratio_to_the_engine():
    """Nothing is weighted or dropped then: it is our `old_logprobs: sampler`."""
    now, old, engine, advantages = policies()
    corrected = their_loss(policy_loss_type="gspo", is_correction_level="token")
    theirs, *_ = corrected(now, old, advantages, MASK, engine)
    out = Gspo(0.2, 0.3)(now, engine, advantages, MASK)
    assert_same_value_and_gradient(reduce_tokens(out.per_token, MASK, "sequence_mean"), theirs, now)


CORRECTIONS = {
    ("token", "clip", "ratio", (0.7, 1.4)): SamplerCorrection(cap=1.4, floor=0.7),
    ("token", "mask", "ratio", (0.7, 1.4)): SamplerCorrection(cap=None, keep="token", low=0.7, high=1.4),
    ("seq", "mask", "ratio", (0.9, 1.2)): SamplerCorrection(cap=None, keep="geometric", low=0.9, high=1.2),
    ("token", "mask", "binary_kl", (0.0, 0.02)): SamplerCorrection(
        cap=None, filters=[SamplerFilter("binary_kl", high=0.02)]
    ),
    ("seq", "mask", "binary_kl", (0.0, 0.03)): SamplerCorrection(
        cap=None, filters=[SamplerFilter("binary_kl", "mean", high=0.03)]
    ),
    ("token", "mask", "tv", (0.0, 0.08)): SamplerCorrection(cap=None, filters=[SamplerFilter("tv", high=0.08)]),
    ("seq", "mask", "tv", (0.0, 0.1)): SamplerCorrection(cap=None, filters=[SamplerFilter("tv", "mean", high=0.1)]),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("named", CORRECTIONS, ids=str)
def test_corrections_of_the_engine(named, how):
    level, mode, gating, threshold = named
    now, old, engine, advantages = policies()
    corrected = their_loss(
        how,
        is_correction_level=level,
        is_correction_mode=mode,
        is_correction_gating=gating,
        is_correction_threshold=threshold,
    )
    theirs, _, _, engine_kl, filtered = corrected(now, old, advantages, MASK, engine)
    out = CORRECTIONS[named](old, engine, MASK)
    per_token = ClippedSurrogate(0.2, 0.3)(now, old, advantages, MASK).per_token * out.weights
    assert_same_value_and_gradient(reduce_tokens(per_token, MASK, HOW[how]), theirs, now)
    assert engine_kl.item() == pytest.approx((engine - old)[MASK].mean().item(), rel=1e-5)
    if mode == "mask":
        assert 0 < filtered < 1, "some are to be dropped and some kept"
        kept = out.metrics["kept_frac"]
        # of answers theirs is a share of answers, ours of their tokens
        dropped = 1 - (kept.amax(-1).mean() if level == "seq" else kept[MASK].mean())
        assert dropped.item() == pytest.approx(filtered.item(), abs=1e-6)
    else:
        assert out.metrics["truncated_frac"][MASK].mean().item() == pytest.approx(filtered.item(), abs=1e-6)


def test_every_correction_that_they_take_is_compared():
    from itertools import product

    taken = set()
    for level, mode, gating in product(("off", "token", "seq"), ("mask", "clip"), ("ratio", "binary_kl", "tv")):
        try:
            losses.PolicyLoss(
                is_correction_level=level,
                is_correction_mode=mode,
                is_correction_gating=gating,
                is_correction_threshold=(0.0, 1.0),
            )
        except ValueError:
            continue
        taken |= {(level, mode, gating)} if level != "off" else set()
    assert taken == {named[:3] for named in CORRECTIONS}
    offered = {action.dest: action.choices for action in openrlhf_parser("train_ppo_ray")._actions}
    assert set(offered["actor.loss_agg_mode"]) == set(HOW)
    assert set(offered["actor.policy_loss_type"]) == {"ppo", "gspo"}
    assert set(offered["algo.kl.estimator"]) == {"k1", "k2", "k3"}


def test_differs_bounds_that_exclude_an_exact_sampler_are_refused():
    """Theirs take a band of ratios without 1 in it, which would drop every token of an engine that is right."""
    now, old, _, advantages = policies()
    loss, *_, filtered = their_loss(is_correction_level="token", is_correction_threshold=(1.1, 5.0))(
        now, old, advantages, MASK, old
    )
    assert (loss.item(), filtered.item()) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"correction\.low=1\.1 excludes a ratio of 1"):
        SamplerCorrection(cap=None, keep="token", low=1.1, high=5.0)


def test_differs_every_ratio_is_held_within_20_nats():
    """Of the engine's ratio and of GSPO's theirs is not: what one of two policies all but excluded weighs e^60."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    now, engine = torch.full((1, 1), -1.0), torch.full((1, 1), -61.0)
    corrected = their_loss(is_correction_level="token", is_correction_threshold=(0.0, 1e30))
    theirs, *_ = corrected(now, now, torch.ones(1, 1), mask, engine)
    weights = SamplerCorrection(cap=None, keep="token", high=1e30)(now, engine, mask).weights
    assert (-theirs).log().item() == pytest.approx(60, rel=1e-5)
    assert weights.log().item() == pytest.approx(20, rel=1e-5)
    gspo, *_ = their_loss(policy_loss_type="gspo")(now, engine, -torch.ones(1, 1), mask)
    assert gspo.log().item() == pytest.approx(60, rel=1e-5)
    assert Gspo()(now, engine, -torch.ones(1, 1), mask).per_token.log().item() == pytest.approx(20, rel=1e-5)


def test_differs_the_binary_kl_of_a_token_that_the_trainer_all_but_excludes():
    """Theirs holds both probabilities within 1e-6 of 0 and 1, a bound of 13.8; ours is that of the two coins."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    old, engine = torch.tensor([[-30.0, -1.0]]), torch.tensor([[0.5, math.exp(-1)]]).log()

    def kept(high: float) -> tuple[bool, bool]:
        corrected = their_loss(
            is_correction_level="seq", is_correction_gating="binary_kl", is_correction_threshold=(0.0, high)
        )
        *_, filtered = corrected(old, old, torch.ones(1, 2), mask, engine)
        ours = SamplerCorrection(cap=None, filters=[SamplerFilter("binary_kl", "mean", high)])(old, engine, mask)
        return filtered.item() == 0, bool(ours.metrics["kept_frac"].all())

    held = 0.5 * (0.5 * math.log(0.5 / 1e-6) + 0.5 * math.log(0.5))
    exact = 0.5 * (0.5 * (math.log(0.5) + 30) + 0.5 * math.log(0.5))
    assert held == pytest.approx(3.107, abs=1e-3)
    assert exact == pytest.approx(7.153, abs=1e-3)
    assert kept(held - 0.01) == (False, False)
    assert kept(held + 0.01) == (True, False)
    assert kept(exact + 0.01) == (True, True)


def test_differs_an_answer_that_does_not_count():
    """Alone in a step it makes their mean 0/0, and their gradient NaN; ours is 0."""
    now, mask = torch.full((1, 2), -1.0, requires_grad=True), torch.zeros(1, 2, dtype=torch.bool)
    theirs = losses.aggregate_loss(now, mask)
    assert theirs.isnan()
    ours = reduce_tokens(now, mask, "token_mean")
    assert ours == 0
    assert (torch.autograd.grad(ours, now)[0] == 0).all()


# --- averages over an optimiser step


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_mean_over_the_micro_batches_of_a_step(how, count):
    """DeepSpeed divides each loss by the number of micro-batches; theirs undoes it, ours divides by the totals."""
    now = logprobs_like(MASK, seed=0).requires_grad_()
    mask = MASK.clone()
    mask[2] = False  # an answer that is masked out: in no denominator, theirs or ours
    parts = list(torch.arange(4).split(-(-4 // count)))
    steps = loss_utils.iter_grad_accum_global_norm(parts, SimpleNamespace(), len(parts), lambda rows: mask[rows])
    per_token = now.square()
    theirs = sum(
        losses.aggregate_loss(per_token[rows], mask[rows], how == "token-mean", **info) / len(parts)
        for rows, info in steps
    )
    totals = {"token_mean": float(mask.sum()), "sequence_mean": float(mask.any(-1).sum())}
    ours = sum(reduce_tokens(per_token[rows], mask[rows], HOW[how], totals[HOW[how]]) for rows in parts)
    assert_same_value_and_gradient(ours, theirs, now)
    assert_same_value_and_gradient(ours, reduce_tokens(per_token, mask, HOW[how]), now)


def test_one_mean_over_a_batch_that_is_a_step():
    mask = MASK.clone()
    mask[2] = False
    info = loss_utils.get_loss_batch_info(SimpleNamespace(), mask)
    now = logprobs_like(MASK, seed=0).requires_grad_()
    for how, ours in HOW.items():
        theirs = losses.aggregate_loss(now.square(), mask, how == "token-mean", **info)
        assert_same_value_and_gradient(reduce_tokens(now.square(), mask, ours), theirs, now)


def test_sft():
    now = logprobs_like(MASK, seed=0).requires_grad_()
    assert_same_value_and_gradient(
        reduce_tokens(token_nll(now), MASK, "token_mean"), losses.SFTLoss()(now, MASK.float()), now
    )
    by_answer = losses.SFTLoss(token_level_loss=False)(now, MASK.float())
    assert_same_value_and_gradient(reduce_tokens(token_nll(now), MASK, "sequence_mean"), by_answer, now)


def test_the_loss_of_a_language_model_is_the_mean_over_its_labels():
    hidden, tokens, weight = language_model()
    mask = ragged([3, 6, 1, 5])
    theirs = losses.GPTLMLoss()(hidden @ weight.T, torch.where(mask, tokens, -100))
    mask[:, 0] = False  # nothing predicts the first
    now = token_scores(hidden, tokens, mask, LMHead(weight)).logprobs
    assert_same_value_and_gradient(reduce_tokens(token_nll(now), mask, "token_mean"), theirs, hidden)


# --- the critic


@pytest.mark.parametrize("clip", [None, 0.5, 0.2])
@pytest.mark.parametrize("how", HOW)
def test_the_critics_loss(clip, how):
    values, old, returns = torch.randn(3, *MASK.shape, generator=torch.Generator().manual_seed(0)).unbind()
    values.requires_grad_()
    theirs = losses.ValueLoss(clip, token_level_loss=how == "token-mean")(values, old, returns, MASK)
    ours, _ = ClippedValue(clip)(values, old, returns)
    assert_same_value_and_gradient(reduce_tokens(ours, MASK, HOW[how]), theirs, values)


# --- KL


def far_policies() -> tuple[Tensor, Tensor, Tensor]:
    """With log-ratios beyond what they hold, on both sides."""
    mask = torch.ones(2, 6, dtype=torch.bool)
    now = torch.tensor([[-0.1, -0.5, -13.0, -30.0, -2.0, -4.0], [-1.0, -0.2, -100.0, -3.0, -2.5, -0.7]])
    ref = torch.tensor([[-0.3, -14.0, -0.1, -0.1, -2.0, -3.0], [-1.4, -12.0, -1.0, -2.9, -6.5, -0.7001]])
    return now.requires_grad_(), ref, logprobs_like(mask, seed=1, scale=2.5, near=now)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_held_within_10(estimator):
    now, ref, _ = far_policies()
    theirs = utils.compute_approx_kl(now, ref, kl_estimator=estimator)
    assert (theirs.abs() == 10).any()
    ours = kl_estimate(now, ref, estimator, bound=10.0)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    mine, other = (torch.autograd.grad(x.sum(), now, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(mine, other, **TOLERANCE)
    free = kl_estimate(now, ref, estimator)
    assert free.abs().max() > 10, "without bound it is not held"


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_unbiased_gradient_of_the_kl_in_the_loss(estimator, on_policy):
    """algo.kl.unbiased_gradient: our k3+ weighted by the ratio up to 10, whatever estimator they log."""
    now, ref, old = far_policies()
    if on_policy:
        old = now.detach()
    theirs = utils.compute_approx_kl(now, ref, log_probs_old=old, kl_estimator=estimator, unbiased_gradient=True)
    ours = kl_penalty(now, ref, old, estimator="k3+", importance_weighted=True, bound=10.0, max_weight=10.0)
    mine, other = (torch.autograd.grad(x.sum(), now, retain_graph=True)[0] for x in (ours, theirs))
    assert (now - old).exp().max() > 10 or on_policy
    torch.testing.assert_close(mine, other, **TOLERANCE)
    # differs on purpose: their value is the estimate itself, ours is weighted as its gradient is
    torch.testing.assert_close(theirs, utils.compute_approx_kl(now, ref, kl_estimator=estimator), **TOLERANCE)
    weights = (now - old).exp().clamp(max=10)
    torch.testing.assert_close(ours, weights * utils.compute_approx_kl(now, ref, kl_estimator="k3"), **TOLERANCE)


# --- log-probabilities and entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_and_entropy_at_the_sampling_temperature(temperature):
    hidden, tokens, weight = language_model()
    mask = ragged(LENGTHS)
    mask[:, 0] = False
    logits = hidden @ weight.T
    theirs = utils.log_probs_from_logits(logits * 1.0, tokens.roll(-1, 1), temperature=temperature)[:, :-1]
    ours = token_scores(hidden, tokens, mask, LMHead(weight), temperature=temperature, with_entropy=True)
    ours_here, theirs_here = torch.where(mask, ours.logprobs, 0.0).sum(), (theirs * mask[:, 1:]).sum()
    torch.testing.assert_close(ours.logprobs[:, 1:], theirs * mask[:, 1:], **TOLERANCE)
    assert_same_value_and_gradient(ours_here, theirs_here, hidden, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("force_eager"):
        entropy = utils.compute_entropy(logits / temperature)[:, :-1]
    torch.testing.assert_close(ours.entropy[:, 1:], entropy * mask[:, 1:], **TOLERANCE)
    assert_same_value_and_gradient(ours.entropy.sum(), (entropy * mask[:, 1:]).sum(), hidden, rtol=1e-4, atol=1e-5)


def test_their_options_are_those_that_are_compared_here():
    """At 0.11's defaults: what the presets and docs/presets.md speak of."""
    args = openrlhf_arguments()
    assert args.actor.loss_agg_mode == "token-mean"
    assert args.algo.advantage.is_correction_level == "off"
    assert list(args.algo.advantage.is_correction_threshold) == [0.5, 5.0]
    assert utils.KL_IS_WEIGHT_CLIP == 10.0
