"""Losses in which pairs look at the others of their batch: numbers by hand, identities."""

import math

import pytest
import torch
from pairs import pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.preference import DPO
from rlhf_lightning.losses.preference_batch import AOT, AOTUnpaired, BetaDPO

# log pi(y_w) - log pi(y_l) is 6 and 1, of the reference 3 and 5; log-ratios of chosen 1 and -1, of rejected -2 and 3
TWO = {
    "chosen": [-4.0, -6.0],
    "rejected": [-10.0, -7.0],
    "ref_chosen": [-5.0, -5.0],
    "ref_rejected": [-8.0, -10.0],
}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_aot_compares_sorted_with_sorted():
    # policy 1, 6 against reference 3, 5
    assert AOT(beta=0.5)(pairs(**TWO)).per_pair.tolist() == pytest.approx([-log_sigmoid(-1), -log_sigmoid(0.5)])
    # chosen -1, 1 against rejected -2, 3
    unpaired = AOTUnpaired(beta=0.5)(pairs(**TWO)).per_pair.tolist()
    assert unpaired == pytest.approx([-log_sigmoid(0.5), -log_sigmoid(-1)])
    smooth = AOT(beta=0.5, label_smoothing=0.1)(pairs(**TWO)).per_pair.tolist()
    assert smooth[0] == pytest.approx(-0.9 * log_sigmoid(-1) - 0.1 * log_sigmoid(1))


@pytest.mark.parametrize("loss", [AOT(0.3), AOTUnpaired(0.3)])
def test_one_pair_alone_is_dpo(loss):
    one = {name: values[:1] for name, values in TWO.items()}
    assert loss(pairs(**one)).per_pair.item() == pytest.approx(DPO(0.3)(pairs(**one)).per_pair.item())
    assert "whole_batch" in loss.needs


@pytest.mark.parametrize("loss", [AOT(0.3), AOTUnpaired(0.3)])
def test_the_order_of_pairs_does_not_matter(loss):
    back = {name: values[::-1] for name, values in TWO.items()}
    assert sorted(loss(pairs(**back)).per_pair.tolist()) == sorted(loss(pairs(**TWO)).per_pair.tolist())


def test_beta_follows_how_easily_the_step_is_told_apart():
    loss = BetaDPO(beta=0.5, alpha=0.6, decay=0.9)
    assert (loss.step_means, loss.running_means) == ({"margin"}, {"margin": 0.9})
    scored = pairs(**TWO, running={"margin": 0.25}, step={"margin": 0.75})
    out = loss(scored)
    assert out.statistics["margin"].tolist() == [1.5, -2.0]  # beta times h of 3 and -4
    beta = 0.5 * (1 + 0.6 * 0.5)
    assert out.per_pair.tolist() == pytest.approx([-log_sigmoid(3 * beta), -log_sigmoid(-4 * beta)])
    assert out.chosen_rewards.tolist() == pytest.approx([beta, -beta])


def test_a_step_like_those_before_it_is_plain_dpo():
    scored = pairs(**TWO, running={"margin": 0.4}, step={"margin": 0.4})
    assert BetaDPO(0.2)(scored).per_pair.tolist() == pytest.approx(DPO(0.2)(pairs(**TWO)).per_pair.tolist())


def test_beta_stays_positive():
    out = BetaDPO(beta=0.5)(pairs(**TWO, step={"margin": -100.0}))
    assert out.chosen_rewards.tolist() == pytest.approx([1e-3, -1e-3])


def test_pairs_are_drawn_by_how_near_they_are_to_the_running_mean():
    loss = BetaDPO(beta=0.5, decay=0.75, keep_frac=0.5)
    assert "drawn_pairs" in loss.needs
    assert loss.running_means == {"margin": 0.75, "margin_std": 0.75}
    # mean 2 and deviation 2: m = 0.75 * 4 + 0.25 * 2 = 3.5, s = 0.75 * 2 + 0.25 * 2 = 2
    weights = loss.log_weights(torch.tensor([0.0, 4.0]).double(), {"margin": 4.0, "margin_std": 2.0})
    assert weights.tolist() == [-0.5 * (3.5 / 2) ** 2, -0.5 * (0.5 / 2) ** 2]


def test_a_policy_that_is_its_reference_draws_blindly():
    loss = BetaDPO(keep_frac=0.5)
    assert loss.log_weights(torch.zeros(3).double(), {"margin": 0.0, "margin_std": 0.0}).tolist() == [0, 0, 0]


def test_of_drawn_pairs_the_deviation_of_all_is_remembered():
    out = BetaDPO(beta=0.5, keep_frac=0.5)(pairs(**TWO, step={"margin": 1.5, "margin_std": 7.0}))
    assert out.statistics["margin"].tolist() == [1.5, -2.0]
    assert out.statistics["margin_std"].tolist() == [7.0, 7.0]
    assert out.chosen_rewards[0].item() == pytest.approx(0.5 * (1 + 0.6 * 1.5)), "the mean of those that were kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AOT(beta=0.0), r"beta=0.0 would not prefer"),
        (lambda: AOTUnpaired(label_smoothing=0.7), r"label_smoothing=0.7 is the share"),
        (lambda: BetaDPO(alpha=0.0), r"alpha=0.0 would not prefer"),
        (lambda: BetaDPO(keep_frac=0.0), r"keep_frac=0.0 is the share of each step's pairs"),
        (lambda: BetaDPO(keep_frac=1.1), r"keep_frac=1.1 is the share of each step's pairs"),
        (lambda: BetaDPO(decay=1.0), r"decay=1.0 is the share of a running mean"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
