"""Losses made of others: sums by hand, weights by hand."""

import math
from dataclasses import replace

import pytest
from jaxtyping import TypeCheckError
from pairs import completions, gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PairScores
from rlhf_lightning.losses.preference import DPO, Hinge
from rlhf_lightning.losses.preference_batch import AOT, BetaDPO
from rlhf_lightning.losses.preference_free import CPO, ChosenNLL, SimPO
from rlhf_lightning.losses.preference_guarded import TDPO
from rlhf_lightning.losses.preference_mixed import RPO, TPO, WPO, WeightedLoss, WeightedLosses
from rlhf_lightning.losses.preference_pointwise import BCOPair

PAIR = {"chosen": [-4.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}


def test_a_sum_of_losses_by_hand():
    mpo = WeightedLosses([WeightedLoss(DPO(0.5), 0.8), WeightedLoss(BCOPair(0.5), 0.2), WeightedLoss(ChosenNLL(), 3.0)])
    out = mpo(pairs(**PAIR))
    dpo, bco = DPO(0.5)(pairs(**PAIR)), BCOPair(0.5)(pairs(**PAIR))
    assert out.per_pair.item() == pytest.approx(0.8 * dpo.per_pair.item() + 0.2 * bco.per_pair.item())
    assert out.per_chosen_token.tolist() == [[6.0, 6.0]]
    assert out.chosen_rewards.item() == dpo.chosen_rewards.item()


def test_a_sum_needs_what_its_losses_need():
    losses = WeightedLosses([WeightedLoss(TDPO()), WeightedLoss(AOT()), WeightedLoss(BetaDPO(decay=0.5))])
    assert losses.needs == {"reference", "ref_kl", "whole_batch"}
    assert (losses.step_means, losses.running_means) == ({"margin"}, {"margin": 0.5})
    scored = pairs(**PAIR)
    assert WeightedLosses([WeightedLoss(BetaDPO())])(scored).statistics.keys() == {"margin"}
    assert WeightedLosses([WeightedLoss(SimPO(gamma=1.0)), WeightedLoss(CPO())]).needs == frozenset()


@pytest.mark.parametrize("average", ["token_mean", "sequence_mean"])
def test_rpo_is_dpo_and_the_likelihood_of_the_chosen_answer(average):
    out = RPO(DPO(0.5), nll_coef=0.5, average=average)(pairs(**PAIR))
    dpo = DPO(0.5)(pairs(**PAIR)).per_pair.item()
    if average == "sequence_mean":
        assert out.per_pair.item() == pytest.approx(dpo + 0.5 * 2)
    else:
        assert out.per_pair.item() == pytest.approx(dpo)
        assert out.per_chosen_token.tolist() == [[1.0, 1.0]]
    assert RPO().needs == {"reference"}


GOLD = [[-1.0, -2.0, -6.0]]


def test_tpo_is_a_preference_loss_and_the_likelihood_of_a_third_answer():
    scored = replace(pairs(**PAIR), gold=completions(GOLD))
    tpo = TPO(CPO(beta=0.5, nll_coef=0.0), nll_coef=2.0)(scored)
    assert tpo.per_pair.item() == pytest.approx(math.log1p(math.exp(-0.5 * 6)))
    assert tpo.per_gold_token.tolist() == [[2.0, 4.0, 12.0]]
    assert tpo.per_chosen_token is None
    tpo_l = TPO(SimPO(beta=2.0, gamma=0.5))(scored)
    assert tpo_l.per_pair.item() == pytest.approx(math.log1p(math.exp(-(2.0 * 0.5 - 0.5))))
    assert (TPO().needs, TPO(DPO()).needs) == ({"gold"}, {"gold", "reference"})


def test_losses_around_tpo_keep_its_term():
    scored = replace(collided(), gold=completions(GOLD))
    both = RPO(TPO(nll_coef=3.0), nll_coef=0.5, average="token_mean")(scored)
    assert both.per_gold_token.tolist() == [[3.0, 6.0, 18.0]]
    assert both.per_chosen_token.tolist() == [[0.5, 1.5]]
    twice = WeightedLosses([WeightedLoss(TPO(), 0.5), WeightedLoss(DPO()), WeightedLoss(TPO(), 2.0)])
    assert twice(scored).per_gold_token.tolist() == [[2.5, 5.0, 15.0]]
    assert WPO(TPO())(scored).per_gold_token.tolist() == [[1.0, 2.0, 6.0]]


def test_what_tpo_refuses():
    with pytest.raises(UserError, match=r"TPO reads a gold answer to each prompt, and these pairs have none"):
        TPO()(pairs(**PAIR))
    with pytest.raises(UserError, match=r"TPO around RPO would train on the gold answers twice: use one"):
        TPO(RPO(TPO()))
    with pytest.raises(UserError, match=r"nll_coef=0.0 would not prefer"):
        TPO(nll_coef=0.0)


def collided():
    return PairScores(
        completions([[-1.0, -3.0]], [[-2.0, -3.0]], log_collision=[[-0.5, -1.5]]),
        completions([[-4.0]], [[-4.0]], log_collision=[[-1.0]]),
    )


def test_wpo_weighs_pairs_by_how_probable_they_are_now():
    plain = Hinge(0.5)(collided()).per_pair.item()
    # means of (-0.5, -1.5) and (-3)
    aligned = WPO(Hinge(0.5))(collided()).per_pair.item()
    assert aligned == pytest.approx(math.exp(-1) * math.exp(-3) * plain)
    bare = WPO(Hinge(0.5), alignment="none")(collided()).per_pair.item()
    assert bare == pytest.approx(math.exp(-2) * math.exp(-4) * plain)
    assert (WPO().needs, WPO(alignment="none").needs) == ({"reference", "log_collision"}, {"reference"})


def test_the_weights_of_wpo_carry_no_gradient():
    weighted, plain = collided(), collided()
    weight = math.exp(-4)
    expected = gradients(Hinge(0.5)(plain).per_pair, plain)
    got = gradients(WPO(Hinge(0.5))(weighted).per_pair, weighted)
    assert got[0] == pytest.approx([weight * g for g in expected[0]])


def test_wpo_weighs_a_term_per_token_too():
    out = WPO(CPO())(collided())
    assert out.per_chosen_token.tolist()[0] == pytest.approx([math.exp(-4), 3 * math.exp(-4)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedLosses([]), r"losses is empty: name at least one"),
        (lambda: WeightedLoss(DPO(), weight=0.0), r"weight of DPO=0.0 would not prefer"),
        (
            lambda: WeightedLosses([WeightedLoss(BetaDPO()), WeightedLoss(BetaDPO())]),
            r"BetaDPO, BetaDPO keep the same running mean \(margin\): use one of them",
        ),
        (lambda: RPO(nll_coef=0.0), r"nll_coef=0.0 would not prefer"),
        (lambda: WPO(AOT()), r"WPO weighs pairs, and AOT sorts them apart"),
    ],
)
def test_combinations_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_average_that_there_is_not():
    with pytest.raises((UserError, TypeCheckError), match="average"):
        RPO(average="mean")(pairs(**PAIR))
