"""Losses without a reference: numbers by hand, identities, edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from pairs import completions, gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PairScores
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_free import CPO, ORPO, AlphaPO, ChosenNLL, SimPO, log_odds, power_reward

PAIR = {"chosen": [-4.0], "rejected": [-10.0]}  # over 2 and 4 tokens: means -2 and -2.5


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def value(loss):
    return loss(pairs(**PAIR)).per_pair.item()


def test_simpo_by_hand_in_both_units():
    expected = -log_sigmoid(2 * (-2 + 2.5) - 0.6)
    assert value(SimPO(beta=2.0, gamma=0.6)) == pytest.approx(expected)
    assert value(SimPO(beta=2.0, gamma_over_beta=0.3)) == pytest.approx(expected)
    smooth = SimPO(beta=2.0, gamma=0.6, label_smoothing=0.1)
    assert value(smooth) == pytest.approx(-0.9 * log_sigmoid(0.4) - 0.1 * log_sigmoid(-0.4))


@pytest.mark.parametrize("loss", [SimPO, AlphaPO])
def test_the_target_margin_is_given_once(loss):
    with pytest.raises(UserError, match=r"gamma=1.0 and gamma_over_beta=0.5 are both: the target margin is either"):
        loss(gamma=1.0, gamma_over_beta=0.5)
    with pytest.raises(UserError, match=r"neither is given: the target margin is either gamma, a difference"):
        loss()
    with pytest.raises(UserError, match=r"gamma=-1.0 would ask the rejected answer to win"):
        loss(gamma=-1.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, -0.01), st.floats(-8, -0.01))
def test_alphapo_becomes_simpo_as_alpha_goes_to_0(chosen, rejected):
    def both(loss):
        scored = pairs([2 * chosen], [4 * rejected], dtype=torch.float64)
        per_pair = loss(scored).per_pair
        return [per_pair.item(), *gradients(per_pair, scored)[0], *gradients(loss(scored).per_pair, scored)[1]]

    simpo = both(SimPO(beta=2.5, gamma=0.4))
    assert both(AlphaPO(beta=2.5, alpha=0.0, gamma=0.4)) == simpo
    for alpha in (1e-8, -1e-8):
        assert both(AlphaPO(beta=2.5, alpha=alpha, gamma=0.4)) == pytest.approx(simpo, abs=1e-6)


def test_alphapo_by_hand_and_its_slope():
    def reward(logprob):
        return (1 - math.exp(logprob) ** -0.25) / 0.25

    expected = -log_sigmoid(2.5 * (reward(-2) - reward(-2.5)) - 0.1)
    assert value(AlphaPO(beta=2.5, alpha=0.25, gamma=0.1)) == pytest.approx(expected)
    x = torch.tensor([-0.5, -3.0], requires_grad=True)
    slope = torch.autograd.grad(power_reward(x, alpha=0.25).sum(), x)[0]
    assert slope.tolist() == pytest.approx([math.exp(0.125), math.exp(0.75)])  # p^-alpha: unlikely answers move faster


def test_alphapo_is_finite_for_answers_that_are_all_but_impossible():
    x = torch.tensor([-1e4], requires_grad=True)
    reward = power_reward(x, alpha=0.5)
    reward.sum().backward()
    assert reward.isfinite().all()
    assert x.grad.isfinite().all()


def test_cpo_by_hand_in_its_three_forms():
    assert value(CPO(beta=0.5)) == pytest.approx(-log_sigmoid(3))
    assert value(CPO(beta=0.1, form="hinge")) == pytest.approx(0.4)
    assert value(CPO(beta=0.5, form="ipo")) == pytest.approx((0.5 - 1) ** 2)
    assert CPO(nll_coef=3.0)(pairs(**PAIR)).per_chosen_token.tolist() == [[6.0, 6.0]]
    assert CPO(nll_coef=0.0)(pairs(**PAIR)).per_chosen_token is None


def test_cpo_on_bent_rewards_by_hand():
    def reward(logprob):
        return (1 - math.exp(-0.1 * logprob)) / 0.1

    assert value(CPO(beta=0.5, alpha=0.1)) == pytest.approx(-log_sigmoid(0.5 * (reward(-4) - reward(-10))))
    assert value(CPO(beta=0.02, form="hinge", alpha=0.1)) == pytest.approx(1 - 0.02 * (reward(-4) - reward(-10)))
    assert value(CPO(beta=0.5, form="ipo", alpha=0.1)) == pytest.approx((reward(-2) - reward(-2.5) - 1) ** 2)


def test_cpo_is_dpo_with_a_reference_that_finds_all_answers_alike():
    uniform = pairs(**PAIR, ref_chosen=[-7.0], ref_rejected=[-7.0])
    assert value(CPO(beta=0.5, nll_coef=0.0)) == pytest.approx(DPO(beta=0.5)(uniform).per_pair.item())


def test_orpo_by_hand():
    def odds(logprob):
        return math.exp(logprob) / (1 - math.exp(logprob))

    out = ORPO(odds_coef=0.5)(pairs(**PAIR))
    assert out.per_pair.item() == pytest.approx(-0.5 * log_sigmoid(math.log(odds(-2) / odds(-2.5))), rel=1e-5)
    assert out.per_chosen_token.tolist() == [[2.0, 2.0]]


def test_odds_of_certainty_are_finite():
    x = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    odds = log_odds(x)
    odds.sum().backward()
    assert odds.tolist() == pytest.approx([math.log(1e6), math.log(1e6), -200.0], rel=1e-3)
    assert x.grad.isfinite().all()


def test_the_likelihood_of_the_chosen_answers_in_both_averages():
    scored = PairScores(completions([[-1.0, -3.0], [-4.0]]), completions([[-9.0], [-9.0]]))
    by_token = ChosenNLL()(scored)
    assert by_token.per_chosen_token.tolist() == [[1.0, 3.0], [4.0, 0.0]]
    assert by_token.per_pair.tolist() == [0.0, 0.0]
    by_answer = ChosenNLL(average="sequence_mean")(scored)
    assert by_answer.per_pair.tolist() == [2.0, 4.0]
    assert by_answer.per_chosen_token is None


@pytest.mark.parametrize(
    "loss", [SimPO(gamma=1.0), AlphaPO(gamma=1.0), CPO(), ORPO(), ChosenNLL()], ids=lambda loss: type(loss).__name__
)
def test_no_reference_is_needed_or_read(loss):
    assert loss.needs == frozenset()
    assert loss(pairs(**PAIR)).per_pair.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimPO(beta=0.0, gamma=1.0), r"beta=0.0 would not prefer"),
        (lambda: SimPO(gamma=1.0, label_smoothing=0.7), r"label_smoothing=0.7 is the share"),
        (lambda: CPO(nll_coef=-1.0), r"nll_coef=-1.0 would lower the chosen answers' likelihood"),
        (lambda: CPO(form="hinge", label_smoothing=0.1), r"label_smoothing=0.1 does nothing with form=hinge"),
        (lambda: ORPO(odds_coef=0.0), r"odds_coef=0.0 would not prefer"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(("make", "name"), [(lambda: CPO(form="x"), "form"), (lambda: ChosenNLL("x"), "average")])
def test_words_that_mean_nothing_are_refused(make, name):
    with pytest.raises((UserError, TypeCheckError), match=name):
        make()
