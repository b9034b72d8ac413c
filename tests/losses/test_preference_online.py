"""XPO and Nash-MD: values and gradients by hand."""

import math
from dataclasses import replace

import pytest
import torch
from pairs import gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses import DPO, IPO, XPO, NashMD, WeightedLoss, WeightedLosses

CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = [-2.0, -3.0], [-5.0, -1.0], [-2.5, -2.0], [-4.0, -1.5]
OWN = torch.tensor([[True, False], [False, True]])


def scored(**options):
    return replace(pairs(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, **options), own=OWN)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_xpo_is_the_preference_loss_and_alpha_times_the_log_probability_of_the_others_answer():
    of_others = [REJECTED[0], CHOSEN[1]]
    for loss in (DPO(beta=0.3), IPO(beta=0.3)):
        expected = loss(scored()).per_pair + 0.2 * torch.tensor(of_others)
        torch.testing.assert_close(XPO(alpha=0.2, loss=loss)(scored()).per_pair, expected)


def test_xpo_pushes_on_the_others_answer_alone():
    plain, optimistic = scored(), scored()
    chosen, rejected = gradients(DPO()(plain).per_pair, plain)
    chosen_x, rejected_x = gradients(XPO(alpha=0.2)(optimistic).per_pair, optimistic)
    assert [x - y for x, y in zip(chosen_x, chosen, strict=True)] == pytest.approx([0.0, 0.2])
    assert [x - y for x, y in zip(rejected_x, rejected, strict=True)] == pytest.approx([0.2, 0.0])


def test_xpo_asks_for_what_its_loss_asks_for_and_for_an_opponent():
    assert XPO(loss=DPO()).needs == {"reference", "opponent"}
    assert "opponent" in WeightedLosses([WeightedLoss(DPO()), WeightedLoss(XPO())]).needs


@pytest.mark.parametrize(
    ("preference", "margins", "wins"),
    [("hard", None, [1.0, 1.0]), ("bradley_terry", [0.5, 2.0], [sigmoid(0.5), sigmoid(2.0)])],
)
def test_nash_md_is_a_policy_gradient_on_the_policys_own_answer(preference, margins, wins):
    batch = scored(margins=margins)
    loss = NashMD(kl_coef=0.4, preference=preference)(batch).per_pair
    # pair 0: the policy's answer was preferred, log-ratio 0.5; pair 1: it was not, log-ratio 0.5
    weights = [wins[0] - 0.5 - 0.4 * 0.5, (1 - wins[1]) - 0.5 - 0.4 * 0.5]
    assert loss.tolist() == pytest.approx([-weights[0] * CHOSEN[0], -weights[1] * REJECTED[1]])
    chosen, rejected = gradients(loss, batch)
    assert chosen == pytest.approx([-weights[0], 0.0])
    assert rejected == pytest.approx([0.0, -weights[1]])


def test_nash_md_stands_still_where_preference_and_kl_balance():
    """P - 1/2 = kl_coef log pi/pi_ref is its fixed point."""
    batch = replace(pairs([-2.0], [-5.0], [-2.0 - 1.25], [-4.0]), own=torch.tensor([[True, False]]))
    loss = NashMD(kl_coef=0.4)(batch).per_pair
    assert gradients(loss, batch) == ([pytest.approx(0.0, abs=1e-6)], [0.0])


@pytest.mark.parametrize("loss", [XPO(), NashMD()])
def test_records_do_not_say_who_drew_their_answers(loss):
    with pytest.raises(UserError, match=rf"{type(loss).__name__} asks which answer .* use OnlineDPOModule"):
        loss(pairs(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))


def test_wrong_options():
    with pytest.raises(UserError, match=r"alpha=0"):
        XPO(alpha=0.0)
    with pytest.raises(UserError, match=r"kl_coef=-1"):
        NashMD(kl_coef=-1.0)
