"""Credits that differ from token to token, by hand; what all credits have in common is in test_group.py."""

import torch

from rlhf_lightning.advantages import BatchNormalised, CentredBatchNormalised, ReMax, RewardsToCome
from rlhf_lightning.advantages.per_token import rewards_to_come


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_remax_subtracts_the_greedy_score_from_the_reward_to_come():
    rewards = torch.tensor([[9.0, -0.1, -0.2, 5.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    values = torch.where(mask, 1.0, 7.0)  # the greedy answer scored 3
    advantages, returns = ReMax()(rewards, values, mask, torch.tensor([0]))
    close(returns, [[0.0, 4.7, 4.8, 5.0, 0.0]])
    close(advantages, [[0.0, 1.7, 1.8, 2.0, 0.0]])
    assert ReMax.baseline == "greedy"


def test_discounted_rewards_to_come_step_over_holes():
    rewards = torch.tensor([[1.0, 100.0, 2.0, 4.0]])
    mask = torch.tensor([[True, False, True, True]])
    close(rewards_to_come(rewards, mask, gamma=0.5), [[1 + 1 + 1.0, 0.0, 2 + 2.0, 4.0]])
    for gamma, expected in ((0.5, [[3.0, 0.0, 4.0, 4.0]]), (0.0, [[1.0, 0.0, 2.0, 4.0]])):
        credit = RewardsToCome(gamma=gamma)
        advantages, returns = credit(rewards, torch.zeros_like(rewards), mask, torch.tensor([0]))
        close(advantages, expected)
        close(returns, expected)
    assert not RewardsToCome.needs_groups


def test_batch_normalisation_is_over_tokens():
    rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])  # returns 0 | 3 3 3: mean 2.25, variance 1.6875
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages, returns = BatchNormalised()(rewards, torch.zeros_like(rewards), mask, torch.tensor([0, 1]))
    close(returns[mask], [0.0, 3.0, 3.0, 3.0])
    close(advantages[mask], [x / 1.6875**0.5 for x in (-2.25, 0.75, 0.75, 0.75)])
    # centred -1.5 | 1.5 1.5 1.5: the same after normalising
    centred, _ = CentredBatchNormalised()(rewards, torch.zeros_like(rewards), mask, torch.tensor([0, 0]))
    close(centred[mask], [x / 1.6875**0.5 for x in (-2.25, 0.75, 0.75, 0.75)])


def test_the_mean_may_be_taken_off_alone():
    rewards = torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 3.0]])  # returns 0 | 3 3 3: mean 2.25
    mask = torch.tensor([[True, False, False], [True, True, True]])
    for credit in (BatchNormalised(divide_by_std=False), CentredBatchNormalised(divide_by_std=False)):
        advantages, _ = credit(rewards, torch.zeros_like(rewards), mask, torch.tensor([0, 0]))
        close(advantages[mask], [-2.25, 0.75, 0.75, 0.75])
        assert (advantages[~mask] == 0).all()
