"""Losses on the difference of implicit rewards: numbers by hand, identities, edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from pairs import gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.losses.divergence import ForwardKL
from rlhf_lightning.losses.preference import (
    DPO,
    IPO,
    DiscoPOP,
    EXOPair,
    Hinge,
    LengthNormalisedDPO,
    RobustDPO,
    discovered,
    exact_preference,
    logistic,
)

# log-ratios +1 and -2: h = 3
PAIR = {"chosen": [-4.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def value(loss, **more):
    return loss(pairs(**PAIR, **more)).per_pair.item()


def test_dpo_by_hand():
    out = DPO(beta=0.5)(pairs(**PAIR))
    assert out.per_pair.item() == pytest.approx(-math.log(sigmoid(1.5)))
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((0.5, -1.0))
    assert not out.chosen_rewards.requires_grad
    # d loss / d log pi(y_w) = -beta (1 - sigma(beta h)), and the opposite for y_l
    scored = pairs(**PAIR)
    up, down = gradients(DPO(beta=0.5)(scored).per_pair, scored)
    assert up == pytest.approx([-0.5 * sigmoid(-1.5)])
    assert down == pytest.approx([0.5 * sigmoid(-1.5)])


@pytest.mark.parametrize("loss", [DPO(), DPO(label_smoothing=0.3), DPO(divergence=ForwardKL()), LengthNormalisedDPO()])
def test_a_policy_that_is_its_reference_loses_log_2(loss):
    same = pairs([-3.0, -5.0], [-4.0, -4.0], [-3.0, -5.0], [-4.0, -4.0])
    assert loss(same).per_pair.tolist() == pytest.approx([math.log(2)] * 2)


def test_smoothing_of_a_half_sees_no_difference_between_the_two_answers():
    swapped = {"chosen": [-10.0], "rejected": [-4.0], "ref_chosen": [-8.0], "ref_rejected": [-5.0]}
    loss = DPO(label_smoothing=0.5)
    assert value(loss) == pytest.approx(loss(pairs(**swapped)).per_pair.item())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.45), st.floats(-5, 5))
def test_the_robust_loss_of_noisy_labels_is_the_plain_loss_on_average(noise, h):
    robust = RobustDPO(beta=1.0, label_smoothing=noise)
    right = robust(pairs([h], [0.0], [0.0], [0.0])).per_pair.item()
    flipped = robust(pairs([0.0], [h], [0.0], [0.0])).per_pair.item()
    plain = DPO(beta=1.0)(pairs([h], [0.0], [0.0], [0.0])).per_pair.item()
    assert (1 - noise) * right + noise * flipped == pytest.approx(plain, abs=1e-4)


def test_hinge_by_hand():
    assert value(Hinge(beta=0.1)) == pytest.approx(0.7)
    assert value(Hinge(beta=0.5)) == 0


def test_ipo_by_hand_in_both_forms():
    # sum: (3 - 1)^2; per token: 1/2 - (-2)/4 = 1, (1 - 1)^2 at beta 0.5
    assert value(IPO(beta=0.5, log_ratio="sum")) == pytest.approx(4)
    assert value(IPO(beta=0.5, log_ratio="token_mean")) == pytest.approx(0)
    assert value(IPO(beta=0.25, log_ratio="token_mean")) == pytest.approx(1)


def test_exo_is_least_where_the_policy_doubts_as_much_as_the_labels():
    d = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    loss = exact_preference(d, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss.sum(), d)[0].item() == pytest.approx(0, abs=1e-12)
    q = sigmoid(1.5)
    by_hand = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    assert value(EXOPair(beta=0.5, label_smoothing=0.1)) == pytest.approx(by_hand)


def test_discopop_by_hand():
    m = sigmoid(1.5 / 0.5)
    by_hand = (1 - m) * -math.log(sigmoid(1.5)) + m * math.exp(-1.5)
    assert value(DiscoPOP(beta=0.5, temperature=0.5)) == pytest.approx(by_hand)


def test_discopop_is_finite_where_the_published_form_is_not():
    d = torch.tensor([-1e4], requires_grad=True)
    loss = discovered(d, temperature=0.05)
    loss.sum().backward()
    assert loss.item() == 1e4
    assert d.grad.item() == -1


def test_length_normalised_dpo_by_hand():
    assert value(LengthNormalisedDPO(beta=0.5)) == pytest.approx(-math.log(sigmoid(0.5)))  # 1/2 - (-2)/4 = 1


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPO(beta=0.5, margin="offset"), -math.log(sigmoid(1.5 - 2))),
        (DPO(beta=0.5, margin="offset", margin_coef=0.5), -math.log(sigmoid(1.5 - 1))),
        (DPO(beta=0.5, margin="log_offset"), -math.log(sigmoid(1.5 - math.log(2)))),
        (DPO(beta=0.5), -math.log(sigmoid(1.5))),
        # -log sigma(-1.5) = 1.5 - log sigma(1.5)
        (DPO(beta=0.5, margin="log_odds"), -math.log(sigmoid(1.5)) + sigmoid(-2) * 1.5),
    ],
)
def test_what_the_margin_column_can_be(loss, expected):
    assert value(loss, margins=[2.0]) == pytest.approx(expected)


def test_soft_labels_are_fitted_by_their_own_log_odds():
    d = torch.tensor([1.3], requires_grad=True)
    logistic(d, label_smoothing=torch.sigmoid(torch.tensor([-1.3]))).sum().backward()
    assert d.grad.item() == pytest.approx(0, abs=1e-6)


LOSSES = [DPO(), RobustDPO(), Hinge(), IPO(), EXOPair(), DiscoPOP(), LengthNormalisedDPO()]


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != DiscoPOP()], ids=lambda loss: type(loss).__name__)
def test_every_loss_starts_by_raising_chosen_and_lowering_rejected(loss):
    scored = pairs([-4.0], [-4.0], [-4.0], [-4.0])
    up, down = gradients(loss(scored).per_pair, scored)
    assert up[0] < 0 < down[0]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_missing_reference_says_what_to_do(loss):
    assert loss.needs == {"reference"}
    with pytest.raises(UserError, match=r"there is none: give a reference, or a loss that needs none, such as SimPO"):
        loss(pairs([-4.0], [-10.0]))


def test_margins_that_are_not_there_or_not_positive_are_named():
    with pytest.raises(UserError, match=r"the column `margin`, which no record here has"):
        value(DPO(margin="offset"))
    with pytest.raises(UserError, match=r"which holds -1.0: give positive margins, or margin: offset"):
        value(DPO(margin="log_offset"), margins=[-1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0.0), r"beta=0.0 would not prefer the chosen answer"),
        (lambda: Hinge(beta=-1.0), r"beta=-1.0 would not prefer"),
        (lambda: DPO(label_smoothing=0.6), r"label_smoothing=0.6 is the share of labels .* give 0 to 0.5"),
        (lambda: DPO(margin_coef=2.0), r"margin_coef=2.0 does nothing with margin=ignore"),
        (lambda: DPO(margin="offset", margin_coef=-1.0), r"margin_coef=-1.0 would ask the rejected answer to win"),
        (lambda: DPO(margin="log_odds", label_smoothing=0.1), r"label_smoothing=0.1 does nothing with margin=log_odds"),
        (lambda: RobustDPO(label_smoothing=0.5), r"label_smoothing=0.5: the robust loss divides by 1 - 2"),
        (lambda: EXOPair(label_smoothing=0.0), r"label_smoothing=0.0: EXO divides by it"),
        (lambda: DiscoPOP(temperature=0.0), r"temperature=0.0 divides the log-ratios"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "name"), [(lambda: DPO(margin="sum"), "margin"), (lambda: IPO(log_ratio="mean"), "log_ratio")]
)
def test_words_that_mean_nothing_are_refused(make, name):
    with pytest.raises((UserError, TypeCheckError), match=name):
        make()


def test_discopop_rises_around_a_difference_of_0_and_falls_elsewhere():
    d = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    discovered(d, temperature=0.05).sum().backward()
    assert (d.grad > 0).tolist() == [False, True, False]
