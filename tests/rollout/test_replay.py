"""What the replay buffer keeps, and whose places its groups take."""

import pytest
import torch

from rlhf_lightning.core.batches import Rollouts
from rlhf_lightning.rollout.replay import ReplayBuffer, ReplaySpec


def rollouts(scores: list[float], groups: list[int]) -> Rollouts:
    """Answers of two tokens to prompts of one, each group's tokens its own."""
    rows = len(scores)
    named = torch.tensor(groups)
    mask = torch.tensor([[False, True, True]]).expand(rows, 3).clone()
    zeros = torch.zeros(rows, 3)
    return Rollouts(
        tokens=named[:, None].expand(rows, 3).clone(),
        attention_mask=torch.ones(rows, 3, dtype=torch.bool),
        mask=mask,
        positions=torch.arange(3).expand(rows, 3).clone(),
        finished=torch.ones(rows, dtype=torch.bool),
        scores=torch.tensor(scores),
        old_logprobs=zeros,
        ref_logprobs=zeros,
        rewards=zeros,
        advantages=zeros,
        values=zeros,
        returns=zeros,
        groups=named,
    )


def buffer(**spec) -> ReplayBuffer:
    return ReplayBuffer(ReplaySpec(**spec), pad_id=0, seed=1)


def told(*informative: int) -> torch.Tensor:
    return torch.tensor(informative, dtype=torch.bool)


def test_a_group_of_which_only_equal_scores_are_left_is_not_kept():
    """Its one other answer was cut off and carries no loss: there would be nothing to draw it by."""
    kept = buffer()
    kept.exchange(rollouts([1.0, 0.0, 0.0], [0, 0, 0]), told(0, 1, 1), rollout=1)
    assert len(kept) == 0
    after, replayed = kept.exchange(rollouts([0.0, 0.0], [0, 0]), told(0, 0), rollout=2)
    assert replayed == 0
    assert after.groups.tolist() == [0, 0]


def test_answers_that_carry_no_loss_in_a_group_that_teaches_are_not_replaced():
    kept = buffer()
    kept.exchange(rollouts([1.0, 0.0], [0, 0]), told(1, 1), rollout=1)
    after, replayed = kept.exchange(rollouts([1.0, 0.0, 0.0], [3, 3, 3]), told(1, 1, 0), rollout=2)
    assert replayed == 0
    assert after.groups.tolist() == [3, 3, 3]


@pytest.mark.parametrize(("dropped", "expected"), [(3, 1), (2, 0), (6, 2), (7, 2)])
def test_a_replayed_group_takes_the_places_of_as_many_answers(dropped, expected):
    """Answers that were dropped are groups of one."""
    kept = buffer()
    kept.exchange(rollouts([1.0, 0.0, 0.5] * 2, [0] * 3 + [1] * 3), told(*[1] * 6), rollout=1)
    scores, groups = [1.0, 0.0] + [0.0] * dropped, [0, 0, *range(2, 2 + dropped)]
    after, replayed = kept.exchange(rollouts(scores, groups), told(1, 1, *[0] * dropped), rollout=2)
    assert replayed == expected
    assert len(after.scores) == len(scores)
    assert sorted(after.groups.bincount().tolist())[-expected - 1 :] == sorted([2] + [3] * expected)
