"""PPO: from scores and KL to rewards and advantages, by hand on a batch with padding."""

import pytest
import torch
from ppo_runs import MASK, answers, on_mask, ppo, scored

from rlhf_lightning.advantages.kl_control import AdaptiveKL, FixedKL
from rlhf_lightning.rewards.combine import ScoredSamples
from rlhf_lightning.stages.reward_shaping import KLSpec, RewardShaping


def test_reward_is_minus_kl_per_token_and_the_score_at_the_last_real_one(tiny_model):
    module = ppo(tiny_model, kl=KLSpec(control=FixedKL(0.5)))
    old, ref = on_mask(-1.0, -2.0, -3.0, -1.0), on_mask(-1.5, -1.0, -3.0, -2.0)
    shaped = module.shape_rewards(answers(), scored(10.0, 20.0), old, ref)
    assert shaped.rewards[0].tolist() == [0, 0, -0.25, 0.5, 10.0]
    assert shaped.rewards[1].tolist() == [0, 0, -0.5 + 20.0, 0, 0]


def test_an_answer_that_did_not_end_pays_or_gets_a_fixed_score(tiny_model):
    zero = on_mask(0, 0, 0, 0)
    cut_off = answers(finished=(False, True))
    pays = ppo(tiny_model, shaping=RewardShaping(missing_eos_penalty=3.0))
    assert pays.shape_rewards(cut_off, scored(1.0, 1.0), zero, zero).rewards.sum(-1).tolist() == [-2.0, 1.0]
    fixed = ppo(tiny_model, shaping=RewardShaping(missing_eos_score=-1.0))
    assert fixed.shape_rewards(cut_off, scored(9.0, 1.0), zero, zero).rewards.sum(-1).tolist() == [-1.0, 1.0]


def test_what_is_said_of_an_answer_that_did_not_end_is_said_last(tiny_model):
    zero = on_mask(0, 0, 0, 0)
    cut_off = answers(finished=(False, True))  # of 3 tokens of 5 at most: the punishment over the last 4 is 1/2

    def score(**options):
        module = ppo(tiny_model, shaping=RewardShaping(overlong_cache=4, **options))
        return module.shape_rewards(cut_off, scored(9.0, 1.0), zero, zero).rewards.sum(-1).tolist()

    assert score() == [8.5, 1.0]
    assert score(missing_eos_factor=0.5) == [4.25, 1.0]
    assert score(missing_eos_score=-1.0) == [-1.0, 1.0]


def test_scores_are_clipped_between_two_ends(tiny_model):
    module, zero = ppo(tiny_model, shaping=RewardShaping(clip=(-1.0, 3.0))), on_mask(0, 0, 0, 0)
    assert module.shape_rewards(answers(), scored(-9.0, 9.0), zero, zero).rewards.sum(-1).tolist() == [-1.0, 3.0]


def test_the_kl_of_a_token_may_be_held(tiny_model):
    module = ppo(tiny_model, kl=KLSpec(control=FixedKL(0.5), bound=0.75))
    old, ref = on_mask(-1.0, -2.0, -3.0, -1.0), on_mask(-1.5, -1.0, -3.0, -2.0)
    shaped = module.shape_rewards(answers(), scored(10.0, 20.0), old, ref)
    assert shaped.rewards[MASK].tolist() == [-0.25, 0.375, 10.0, 20.0 - 0.375]


def test_the_kl_that_steers_is_of_an_answer_or_of_a_token(tiny_model):
    """KL 1.5 and -1 of answers of 3 and 1 tokens: 0.25 in the mean of answers, (0.5 - 1)/2 of tokens."""
    old, ref = on_mask(-1.0, -1.0, -1.0, -2.0), on_mask(-1.5, -1.5, -1.5, -1.0)
    coefs = []
    for per in ("sequence", "token"):
        control = AdaptiveKL(init_coef=1.0, target=0.25, horizon=10.0, per=per)
        module = ppo(tiny_model, kl=KLSpec(control=control))
        module.shape_rewards(answers(), scored(0.0, 0.0), old, ref)
        coefs.append(module.shaper.kl_coef)
    assert coefs == pytest.approx([1.0, 1 - 0.2 * 2 / 10])


def test_scores_are_scaled_by_their_running_deviation_then_clipped(tiny_model):
    zero = on_mask(0, 0, 0, 0)
    module = ppo(tiny_model, shaping=RewardShaping(scale_by_running_std=True, clip=1.5))
    # deviation of (0, 4) is 2: 0 and 2, clipped to 1.5
    assert module.shape_rewards(answers(), scored(0.0, 4.0), zero, zero).rewards.sum(-1).tolist() == [0.0, 1.5]
    # deviation of (0, 4, 2, 2) is sqrt 2
    second = module.shape_rewards(answers(), scored(2.0, 2.0), zero, zero).rewards.sum(-1)
    assert second.tolist() == pytest.approx([2**0.5, 2**0.5])


def test_rewards_per_token_land_on_their_tokens(tiny_model):
    zero = on_mask(0, 0, 0, 0)
    per_token = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    both = ScoredSamples(torch.tensor([106.0, 104.0]), torch.tensor([100.0, 100.0]), per_token, {})
    rewards = ppo(tiny_model).shape_rewards(answers(), both, zero, zero).rewards
    assert rewards.tolist() == [[0, 0, 1, 2, 103], [0, 0, 104, 0, 0]]


def test_whitened_advantages_have_mean_0_and_deviation_1_over_real_tokens(tiny_model):
    rewards = on_mask(1.0, -2.0, 5.0, 3.0)
    advantages, returns = ppo(tiny_model).advantages(rewards, on_mask(0.1, 0.2, 0.3, 0.4), MASK, torch.arange(2))
    assert advantages[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not advantages[~MASK].any()
    plain, same = ppo(tiny_model, whiten_advantages=False).advantages(
        rewards, on_mask(0.1, 0.2, 0.3, 0.4), MASK, torch.arange(2)
    )
    torch.testing.assert_close(same, returns)
    assert plain[1, 2].item() == pytest.approx(3.0 - 0.4)
    centred, _ = ppo(tiny_model, whiten_advantages="mean").advantages(
        rewards, on_mask(0.1, 0.2, 0.3, 0.4), MASK, torch.arange(2)
    )
    torch.testing.assert_close(centred, torch.where(MASK, plain - plain[MASK].mean(), 0.0))
    sample, _ = ppo(tiny_model, whiten_advantages="sample").advantages(
        rewards, on_mask(0.1, 0.2, 0.3, 0.4), MASK, torch.arange(2)
    )
    assert sample[MASK].std(correction=1).item() == pytest.approx(1, abs=1e-5)


def test_advantages_are_clipped_before_they_are_whitened(tiny_model):
    rewards, values = on_mask(0.0, 0.0, 5.0, -9.0), on_mask(0, 0, 0, 0)
    clipped, returns = ppo(tiny_model, whiten_advantages=False, clip_advantages=(-3.0, 4.0)).advantages(
        rewards, values, MASK, torch.arange(2)
    )
    assert clipped[MASK].tolist() == pytest.approx([4.0, 4.0, 4.0, -3.0])
    assert returns[1, 2] == -9.0  # what the critic learns is not clipped
    whitened, _ = ppo(tiny_model, clip_advantages=(-3.0, 4.0)).advantages(rewards, values, MASK, torch.arange(2))
    assert whitened[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert not clipped[~MASK].any()
