import pytest
import torch

from rlhf_lightning.advantages import Centred, OptimalTokenBaseline

# a prompt token, then answers of 3, 2 and 2 tokens to one prompt and of 1 to another; scores 4, 1, 3 and 5 at the end
MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 0]]).bool()
REWARDS = torch.tensor([[0, 0, 0, 4], [0, 0, 1, 0], [0, 0, 3, 0], [0, 5, 0, 0]]).float()
GROUPS = torch.tensor([7, 7, 7, 2])
# how far gradients vary: summed up, 1 2 3 / 1 4 / 2 2
VARIANCE = torch.tensor([[9, 1, 1, 1], [9, 1, 3, 9], [9, 2, 0, 9], [9, 1, 9, 9]]).float()


def test_the_baseline_is_weighted_by_what_an_answers_gradient_has_varied():
    advantages, returns = OptimalTokenBaseline()(REWARDS, VARIANCE, MASK, GROUPS)
    first = (1 * 4 + 1 * 1 + 2 * 3) / 4
    second = (2 * 4 + 4 * 1 + 2 * 3) / 8
    expected = torch.tensor(
        [
            [0, 4 - first, 4 - second, 0],  # no other answer has a third token: there is nothing to compare it with
            [0, 1 - first, 1 - second, 0],
            [0, 3 - first, 3 - second, 0],
            [0, 0, 0, 0],  # alone
        ]
    )
    torch.testing.assert_close(advantages, expected)
    assert returns[:, 1].tolist() == [4, 1, 3, 5]


def test_tokens_that_no_other_answer_reaches_may_keep_their_score():
    advantages, _ = OptimalTokenBaseline(uncompared="score")(REWARDS, VARIANCE, MASK, GROUPS)
    assert advantages[0, 3] == 4
    assert advantages[3, 1] == 0  # alone


def test_advantages_weighted_alike_add_up_to_nothing():
    """What makes the weighted sum of squares smallest: sum_j W_jt A_jt = 0 at every t."""
    draw = torch.Generator().manual_seed(0)
    rewards, variance = torch.randn(12, 9, generator=draw), torch.rand(12, 9, generator=draw)
    mask = torch.arange(9) < torch.randint(2, 10, (12, 1), generator=draw)
    groups = torch.arange(12) // 4
    advantages, _ = OptimalTokenBaseline()(rewards, variance, mask, groups)
    weights = torch.where(mask, variance, 0.0).cumsum(-1)
    sums = torch.zeros(3, 9).index_add(0, groups, weights * advantages)
    torch.testing.assert_close(sums, torch.zeros(3, 9), atol=1e-5, rtol=0)  # float32 sums of a few dozen
    assert advantages.abs().sum() > 1


def test_gradients_that_vary_alike_leave_the_plain_mean():
    mask = MASK[:, :3] & MASK[:1, :3]
    mask[3] = mask[0]
    rewards = torch.where(torch.arange(3) == 2, torch.tensor([[4.0], [1.0], [3.0], [5.0]]), 0.0)
    advantages, _ = OptimalTokenBaseline()(rewards, torch.ones(4, 3), mask, torch.zeros(4, dtype=torch.long))
    plain, _ = Centred()(rewards, torch.zeros(4, 3), mask, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(advantages, plain)


def test_a_policy_that_is_certain_of_everything_teaches_nothing():
    advantages, _ = OptimalTokenBaseline()(REWARDS, torch.zeros_like(REWARDS), MASK, GROUPS)
    assert not advantages.any()


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_the_order_of_answers_says_nothing(rows):
    advantages, _ = OptimalTokenBaseline()(REWARDS[rows], VARIANCE[rows], MASK[rows], GROUPS[rows])
    expected, _ = OptimalTokenBaseline()(REWARDS, VARIANCE, MASK, GROUPS)
    torch.testing.assert_close(advantages, expected[rows])
