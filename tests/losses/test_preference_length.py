"""Losses against length bias: numbers by hand, identities."""

import math

import pytest
import torch
from pairs import completions, gradients, pairs

from rlhf_lightning.core.errors import UserError
from rlhf_lightning.core.interfaces import CompletionScores, PairScores
from rlhf_lightning.losses.preference import DPO, IPO
from rlhf_lightning.losses.preference_length import LDDPO, RDPO

PAIR = {"chosen": [-4.0], "rejected": [-10.0], "ref_chosen": [-5.0], "ref_rejected": [-8.0]}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_rdpo_by_hand():
    # h = 3, chosen has 2 tokens and rejected 4
    out = RDPO(beta=0.5, alpha=0.1)(pairs(**PAIR))
    assert out.per_pair.item() == pytest.approx(-log_sigmoid(1.5 - 0.2))
    assert out.chosen_rewards.item() == pytest.approx(0.5 + 0.2)


def test_a_longer_chosen_answer_is_learnt_less_from():
    longer = pairs([-4.0], [-4.0], [-4.0], [-4.0], lengths=(8, 2))
    shorter = pairs([-4.0], [-4.0], [-4.0], [-4.0], lengths=(2, 8))
    loss = RDPO(alpha=0.1)
    assert abs(gradients(loss(longer).per_pair, longer)[0][0]) < abs(gradients(loss(shorter).per_pair, shorter)[0][0])


def uneven():
    return PairScores(
        completions([[-1.0, -2.0, -3.0]], [[-2.0, -2.0, -2.0]]), completions([[-4.0, -1.0]], [[-1.0, -1.0]])
    )


def test_tokens_beyond_the_shorter_answer_count_alpha_times():
    # chosen: (-1 + 2) + (-2 + 2) + alpha (-3 + 2); rejected: -3 + 0
    loss = LDDPO(alpha=0.5, loss=DPO(beta=1.0))
    assert loss(uneven()).per_pair.item() == pytest.approx(-log_sigmoid(0.5 + 3))
    scored = uneven()
    loss(scored).per_pair.sum().backward()
    grad = scored.chosen.logprobs.grad[0].tolist()
    assert grad[2] == pytest.approx(0.5 * grad[0])


@pytest.mark.parametrize("inner", [DPO(), IPO()])
def test_at_alpha_1_it_is_the_loss_within(inner):
    assert LDDPO(alpha=1.0, loss=inner)(uneven()).per_pair.item() == pytest.approx(inner(uneven()).per_pair.item())


def test_padding_on_the_left_changes_nothing():
    def moved(side):
        parts = {name: getattr(side, name) for name in ("logprobs", "mask", "ref_logprobs")}
        return CompletionScores(**{name: torch.nn.functional.pad(part, (2, 0)) for name, part in parts.items()})

    scored = uneven()
    left = PairScores(moved(scored.chosen), moved(scored.rejected))
    loss = LDDPO(alpha=0.3)
    assert loss(left).per_pair.item() == loss(scored).per_pair.item()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RDPO(beta=0.0), r"beta=0.0 would not prefer"),
        (lambda: RDPO(alpha=0.0), r"alpha=0.0 would not prefer"),
        (lambda: LDDPO(alpha=1.5), r"alpha=1.5 is the weight of tokens beyond the shorter answer: give 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
