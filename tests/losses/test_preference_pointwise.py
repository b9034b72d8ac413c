"""Losses that judge each answer on its own: numbers by hand, identities, edges."""

import math

import pytest
import torch
from pairs import gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.preference_pointwise import APODown, APOZero, BCOPair, NCAPair, SPPOHard, binary_classifier

# log-ratios +1 and -2, rewards 0.5 and -1 at beta 0.5
PAIR = {"chosen": [-4.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return math.log(sigmoid(x))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (NCAPair(0.5), -log_sigmoid(0.5) - 0.5 * log_sigmoid(-0.5) - 0.5 * log_sigmoid(1)),
        (BCOPair(0.5), -log_sigmoid(0.5) - log_sigmoid(1)),
        (SPPOHard(0.5), (1 - 1) ** 2 + (-2 + 1) ** 2),
        (APOZero(0.5), 1 - sigmoid(0.5) + sigmoid(-1)),
        (APODown(0.5), sigmoid(0.5) + 1 - sigmoid(1.5)),
    ],
)
def test_by_hand(loss, expected):
    out = loss(pairs(**PAIR))
    assert out.per_pair.item() == pytest.approx(expected)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((0.5, -1.0))


def test_which_way_each_pushes_at_the_start():
    same = {"chosen": [-4.0], "rejected": [-4.0], "ref_chosen": [-4.0], "ref_rejected": [-4.0]}
    for loss in (NCAPair(), BCOPair(), SPPOHard(), APOZero()):
        scored = pairs(**same)
        up, down = gradients(loss(scored).per_pair, scored)
        assert up[0] < 0 < down[0], loss
    # APO-down: from far below the reference, chosen is lowered too
    scored = pairs([-4.0], [-60.0], [-4.0], [-4.0])
    up, down = gradients(APODown().__call__(scored).per_pair, scored)
    assert up[0] > 0
    assert down[0] > 0


def test_the_shift_of_bco_is_the_running_mean_of_the_rewards():
    loss = BCOPair(beta=0.5, shift_decay=0.9)
    assert loss.running_means == {"reward": 0.9}
    assert BCOPair().running_means == {}
    out = loss(pairs(**PAIR, running={"reward": 0.25}))
    assert out.per_pair.item() == pytest.approx(-log_sigmoid(0.25) - log_sigmoid(1.25))
    assert out.statistics["reward"].tolist() == [-0.25]  # mean of 0.5 and -1
    assert loss(pairs(**PAIR)).per_pair.item() == pytest.approx(BCOPair(0.5)(pairs(**PAIR)).per_pair.item())


def test_a_shift_that_equals_both_rewards_leaves_log_4():
    r = torch.tensor([3.0])
    assert binary_classifier(r, r, shift=3.0).item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("loss", [NCAPair, BCOPair, SPPOHard, APOZero, APODown])
def test_numbers_that_cannot_be_meant_are_refused(loss):
    with pytest.raises(UserError, match=r"beta=0.0 would not prefer the chosen answer"):
        loss(beta=0.0)


def test_a_running_mean_has_to_move():
    with pytest.raises(UserError, match=r"shift_decay=1.0 is the share of a running mean that a step keeps"):
        BCOPair(shift_decay=1.0)
