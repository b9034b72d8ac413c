"""DPO with a guard: numbers by hand, identities."""

import math

import pytest
from jaxtyping import TypeCheckError
from pairs import completions, gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import PairScores
from rlhf_lightning.losses.divergence import ChiSquaredKL
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_guarded import DPOP, TDPO, ChiPO

RISEN = {"chosen": [-4.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}
FALLEN = {"chosen": [-6.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_dpop_is_dpo_until_the_chosen_answer_falls():
    loss = DPOP(beta=0.5, penalty=3.0)
    assert loss(pairs(**RISEN)).per_pair.item() == pytest.approx(DPO(0.5)(pairs(**RISEN)).per_pair.item())
    assert loss(pairs(**FALLEN)).per_pair.item() == pytest.approx(-log_sigmoid(0.5 * (1 - 3)))
    # and then it pulls the chosen answer back 1 + penalty times as hard
    scored = pairs(**FALLEN)
    up, down = gradients(loss(scored).per_pair, scored)
    assert -up[0] / down[0] == pytest.approx(4.0)


def test_chipo_by_hand_and_as_a_divergence_of_dpo():
    difference = 0.5 * ((math.e + 1) - (math.exp(-2) - 2))
    assert ChiPO(beta=0.5)(pairs(**RISEN)).per_pair.item() == pytest.approx(-log_sigmoid(difference))
    as_dpo = DPO(beta=0.5, divergence=ChiSquaredKL())(pairs(**RISEN)).per_pair.item()
    assert ChiPO(beta=0.5)(pairs(**RISEN)).per_pair.item() == pytest.approx(as_dpo)


def test_no_gradient_beyond_the_largest_reward():
    scored = pairs(**RISEN)
    out = ChiPO(beta=0.5, reward_bound=1.0)(scored)
    assert out.per_pair.item() == pytest.approx(-log_sigmoid(2))
    assert gradients(out.per_pair, scored) == ([0.0], [0.0])


def with_kl(chosen, rejected):
    scored = PairScores(
        completions([[-1.0, -3.0]], [[-2.0, -3.0]], ref_kl=[chosen]),
        completions([[-4.0, -6.0]], [[-4.0, -4.0]], ref_kl=[rejected]),
    )
    for side in (scored.chosen, scored.rejected):
        side.ref_kl.requires_grad_()
    return scored


def test_tdpo_by_hand_in_both_versions():
    # h = 1 + 2, sequence KL 0.3 and 0.9
    assert TDPO(beta=0.5, version=1)(with_kl([0.1, 0.2], [0.4, 0.5])).per_pair.item() == pytest.approx(
        -log_sigmoid(0.5 * 3 - 0.5 * 0.6)
    )
    assert TDPO(beta=0.5, alpha=0.7)(with_kl([0.1, 0.2], [0.4, 0.5])).per_pair.item() == pytest.approx(
        -log_sigmoid(0.5 * 3 - 0.7 * 0.5 * 0.6)
    )


@pytest.mark.parametrize(("version", "chosen_learns"), [(1, True), (2, False)])
def test_only_version_1_has_a_gradient_through_the_kl_of_the_chosen_answer(version, chosen_learns):
    scored = with_kl([0.1, 0.2], [0.4, 0.5])
    TDPO(version=version)(scored).per_pair.sum().backward()
    assert (scored.chosen.ref_kl.grad is not None) == chosen_learns
    assert (scored.rejected.ref_kl.grad > 0).all()  # what is not preferred is held back


def test_tdpo_at_the_reference_is_dpo():
    scored = with_kl([0.0, 0.0], [0.0, 0.0])
    assert TDPO(beta=0.5)(scored).per_pair.item() == pytest.approx(DPO(0.5)(scored).per_pair.item())
    assert TDPO().needs == {"reference", "ref_kl"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOP(penalty=0.0), r"penalty=0.0 would not prefer"),
        (lambda: ChiPO(reward_bound=-1.0), r"reward_bound=-1.0 would not prefer"),
        (lambda: TDPO(alpha=0.0), r"alpha=0.0 would not prefer"),
        (lambda: TDPO(alpha=0.7, version=1), r"alpha=0.7 does nothing with version=1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_there_is_no_third_version():
    with pytest.raises((UserError, TypeCheckError), match="version"):
        TDPO(version=3)
